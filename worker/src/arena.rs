//! A device's memory.

#[cfg(target_os = "linux")]
use crate::transport::memory::LentMemory;
use mesh::plan::{ALIGN, Buffer};
use std::alloc::Layout;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A device's memory: one block, as large as the plan says, and a guard behind it that no kernel may touch.
///
/// A device whose peers are other processes has a shared arena: those on its host map it to look at, so that tensors
/// need not be copied on their way out.
#[derive(Debug)]
pub struct Arena {
    memory: *mut u8,
    bytes: usize,
    block: Block,
}

/// What the memory is taken from.
#[derive(Debug)]
enum Block {
    Private,
    #[cfg(target_os = "linux")]
    Shared(Arc<LentMemory>, OwnedFd),
}

// SAFETY: an arena is plain memory; who may touch which part of it when is the plan's business: a device's own steps,
// and a peer that receives from it between `send` and `finish`.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// The system's large page: an arena of gigabytes in pages of 4 KiB has more of them than the processor can look up at once.
const HUGE_PAGE: usize = 2 << 20;

fn ask_for_huge_pages(memory: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_PAGE && memory.addr().is_multiple_of(HUGE_PAGE) {
        let advice = rustix::mm::Advice::LinuxHugepage;
        // SAFETY: the range was just allocated and begins a page; the advice changes nothing that it holds. Where the
        // system does not follow it, it goes on with small ones.
        let _ = unsafe { rustix::mm::madvise(memory.cast(), bytes / HUGE_PAGE * HUGE_PAGE, advice) };
    }
}

const GUARD_BYTES: usize = 4096;
const GUARD: u8 = 0xa5;

impl Arena {
    fn layout(bytes: usize) -> Option<Layout> {
        let align = if bytes < HUGE_PAGE { ALIGN } else { HUGE_PAGE };
        Layout::from_size_align(bytes.checked_add(GUARD_BYTES)?, align).ok()
    }

    /// `bytes` of memory, of which a plan reads nothing that it has not written; None if the machine does not have them.
    /// Nothing is written here, so pages come when a step first touches them, on the thread that does.
    pub fn private(bytes: usize) -> Option<Arena> {
        // SAFETY: the layout is not empty, for the guard is not.
        let memory = unsafe { std::alloc::alloc(Arena::layout(bytes)?) };
        if memory.is_null() {
            return None;
        }
        ask_for_huge_pages(memory, bytes);
        Some(Arena { memory, bytes, block: Block::Private }.with_guard())
    }

    /// `bytes` of memory that peers on this host can look at; private ones where the system cannot keep peers from writing.
    /// None if the machine does not have them.
    pub fn shared(bytes: usize) -> Option<Arena> {
        // The system refuses at once what it will never have for private memory only.
        let private = Arena::private(bytes)?;
        #[cfg(target_os = "linux")]
        if let Ok((memory, fd)) = LentMemory::create("mesh-arena", bytes.checked_add(GUARD_BYTES)?) {
            let memory = Arc::new(memory);
            ask_for_huge_pages(memory.start(), bytes);
            return Some(Arena { memory: memory.start(), bytes, block: Block::Shared(memory, fd) }.with_guard());
        }
        Some(private)
    }

    fn with_guard(self) -> Arena {
        // SAFETY: the guard lies at the end of the block.
        unsafe { std::ptr::write_bytes(self.memory.add(self.bytes), GUARD, GUARD_BYTES) };
        self
    }

    /// What peers on this host may look at, and the descriptor to hand to them; None if the arena is private.
    #[cfg(target_os = "linux")]
    pub(crate) fn lent(&self) -> Option<(&Arc<LentMemory>, &OwnedFd)> {
        match &self.block {
            Block::Private => None,
            Block::Shared(memory, fd) => Some((memory, fd)),
        }
    }

    /// Bytes, without the guard.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where a buffer lies.
    ///
    /// # Panics
    /// If it does not lie in the arena.
    pub fn at(&self, buffer: Buffer) -> *mut u8 {
        assert!(buffer.offset + buffer.bytes <= self.bytes, "a buffer outside the arena");
        // SAFETY: inside the block.
        unsafe { self.memory.add(buffer.offset) }
    }

    /// Whether nobody wrote behind the end.
    pub fn guarded(&self) -> bool {
        // SAFETY: the guard lies at the end of the block and is written by `with_guard` only.
        let guard = unsafe { std::slice::from_raw_parts(self.memory.add(self.bytes), GUARD_BYTES) };
        guard.iter().all(|b| *b == GUARD)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        match &self.block {
            Block::Private => {
                if let Some(layout) = Arena::layout(self.bytes) {
                    // SAFETY: allocated by `private` with this layout.
                    unsafe { std::alloc::dealloc(self.memory, layout) };
                }
            }
            // Unmapped with its last owner.
            #[cfg(target_os = "linux")]
            Block::Shared(..) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_watches_behind_an_arena() {
        for arena in [Arena::private(8192).unwrap(), Arena::shared(8192).unwrap()] {
            let at = arena.at(Buffer { offset: 0, bytes: 8192 });
            assert!(at.addr().is_multiple_of(ALIGN));
            // SAFETY: the block has a byte behind the arena.
            unsafe {
                std::ptr::write_bytes(at, 0, 8192);
                assert!(arena.guarded());
                at.add(8192).write(0);
            }
            assert!(!arena.guarded(), "{arena:?}");
        }
    }

    #[test]
    fn more_than_the_machine_has_is_refused() {
        for bytes in [1 << 48, usize::MAX - 8, usize::MAX / 2] {
            assert!(Arena::private(bytes).is_none() && Arena::shared(bytes).is_none(), "{bytes}");
        }
    }
}
