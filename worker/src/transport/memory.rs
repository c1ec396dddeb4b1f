//! Memory that processes share: a sealed memfd, mapped.
//!
//! [`SharedMemory`] is written by both sides; [`LentMemory`] by the process that made it, and others only look at it.

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Nobody can make the memory smaller under a mapping, which would kill whoever touches it.
const SIZE_SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK);
/// Both sides write; nothing changes about that.
const SEALS: SealFlags = SIZE_SEALS.union(SealFlags::SEAL);
/// Nobody can write but through a mapping that is there already.
const LENT_SEALS: SealFlags = SEALS.union(SealFlags::FUTURE_WRITE);

/// A mapping of a memfd whose size is sealed.
#[derive(Debug)]
struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory that stays where it is until it is dropped; words are atomics, and the copies are
// ordered by them.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: &OwnedFd, bytes: usize, access: ProtFlags) -> io::Result<Mapping> {
        // SAFETY: a new mapping at an address that the kernel picks; its size is sealed, so that it stays readable.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, fd.as_fd(), 0)? };
        NonNull::new(at.cast()).map(|at| Mapping { at, bytes }).ok_or_else(|| io::Error::other("no address"))
    }

    /// Where the `bytes` bytes from `offset` on lie; None if they do not all lie in the mapping.
    fn at(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let inside = offset <= self.bytes && bytes <= self.bytes - offset;
        // SAFETY: inside the mapping.
        inside.then(|| unsafe { self.at.as_ptr().add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; whoever borrowed from it is gone.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

fn memfd(name: &str, bytes: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes as u64)?;
    Ok(fd)
}

/// Memory of one process that others on its host may look at.
#[derive(Debug)]
pub(crate) struct LentMemory(Mapping);

impl LentMemory {
    /// New memory, all zeros, for this process to write, and the descriptor to hand to others.
    ///
    /// # Errors
    /// A system that cannot keep others from writing to it.
    pub fn create(name: &str, bytes: usize) -> io::Result<(LentMemory, OwnedFd)> {
        let fd = memfd(name, bytes)?;
        let mapping = Mapping::new(&fd, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        rustix::fs::fcntl_add_seals(&fd, LENT_SEALS)?;
        Ok((LentMemory(mapping), fd))
    }

    /// What another process made, to look at. It may change at any time, and stays when that process ends.
    pub fn open(fd: &OwnedFd) -> io::Result<LentMemory> {
        let bytes = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(io::Error::other)?;
        if !rustix::fs::fcntl_get_seals(fd)?.contains(SIZE_SEALS) {
            return Err(io::Error::other("lent memory whose size is not sealed"));
        }
        Ok(LentMemory(Mapping::new(fd, bytes, ProtFlags::READ)?))
    }

    /// Where it begins. Only its maker writes there.
    pub fn start(&self) -> *mut u8 {
        self.0.at.as_ptr()
    }

    /// The offset of bytes that lie in it entirely.
    pub fn offset_of(&self, from: *const u8, bytes: usize) -> Option<usize> {
        let offset = from.addr().checked_sub(self.0.at.as_ptr().addr())?;
        self.0.at(offset, bytes).map(|_| offset)
    }

    /// Where bytes lie that have a place in it entirely.
    pub fn at(&self, offset: usize, bytes: usize) -> Option<*const u8> {
        self.0.at(offset, bytes).map(<*mut u8>::cast_const)
    }
}

/// Memory that several processes write: what is read from it is checked before it is used.
#[derive(Debug)]
pub(super) struct SharedMemory(Mapping);

impl SharedMemory {
    /// New memory, all zeros, and the descriptor to hand to others.
    pub fn create(name: &str, bytes: usize) -> io::Result<(SharedMemory, OwnedFd)> {
        let fd = memfd(name, bytes)?;
        rustix::fs::fcntl_add_seals(&fd, SEALS)?;
        Ok((SharedMemory::map(&fd, bytes)?, fd))
    }

    /// Maps what another process made, if it has exactly `bytes` bytes and can no longer change its size.
    pub fn open(fd: &OwnedFd, bytes: usize) -> io::Result<SharedMemory> {
        let found = rustix::fs::fstat(fd)?.st_size;
        if found != i64::try_from(bytes).unwrap_or(i64::MAX) {
            return Err(io::Error::other(format!("shared memory of {found} bytes, where {bytes} were agreed")));
        }
        if !rustix::fs::fcntl_get_seals(fd)?.contains(SEALS) {
            return Err(io::Error::other("shared memory whose size is not sealed"));
        }
        SharedMemory::map(fd, bytes)
    }

    fn map(fd: &OwnedFd, bytes: usize) -> io::Result<SharedMemory> {
        Ok(SharedMemory(Mapping::new(fd, bytes, ProtFlags::READ | ProtFlags::WRITE)?))
    }

    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        self.0.at(offset, bytes).expect("inside the shared memory")
    }

    /// A word of 32 bits.
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        let at = self.at(offset, 4).cast();
        assert_eq!(offset % 4, 0, "words are aligned");
        // SAFETY: inside the mapping and aligned, for a mapping begins at a page; it lives as long as `self`.
        unsafe { AtomicU32::from_ptr(at) }
    }

    /// A word of 64 bits.
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8).cast();
        assert_eq!(offset % 8, 0, "words are aligned");
        // SAFETY: inside the mapping and aligned, for a mapping begins at a page; it lives as long as `self`.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// Copies bytes into the memory.
    ///
    /// # Safety
    /// `bytes` bytes are readable at `from`, outside the mapping.
    pub unsafe fn write(&self, offset: usize, from: *const u8, bytes: usize) {
        // SAFETY: the destination lies inside the mapping. A peer that keeps to the rules does not touch it now; one
        // that does not can only spoil bytes, for every pattern is a valid byte.
        unsafe { std::ptr::copy_nonoverlapping(from, self.at(offset, bytes), bytes) }
    }

    /// Copies bytes out of the memory.
    ///
    /// # Safety
    /// `bytes` bytes are writable at `to`, outside the mapping.
    pub unsafe fn read(&self, offset: usize, to: *mut u8, bytes: usize) {
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset, bytes).cast_const(), to, bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_show_the_same_bytes() {
        let (a, fd) = SharedMemory::create("test", 8192).unwrap();
        let b = SharedMemory::open(&fd, 8192).unwrap();
        let (out, mut got) = ([7u8; 100], [0u8; 100]);
        // SAFETY: both arrays have 100 bytes.
        unsafe {
            a.write(4000, out.as_ptr(), 100);
            b.read(4000, got.as_mut_ptr(), 100);
        }
        assert_eq!(out, got);
    }

    #[test]
    fn memory_of_another_size_or_without_seals_is_refused() {
        let (_a, fd) = SharedMemory::create("test", 8192).unwrap();
        assert!(SharedMemory::open(&fd, 4096).unwrap_err().to_string().contains("8192 bytes, where 4096"));
        assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "the size is sealed");
        let open = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, 4096).unwrap();
        assert!(SharedMemory::open(&open, 4096).unwrap_err().to_string().contains("not sealed"));
    }
    #[test]
    fn lent_memory_is_looked_at_by_others_and_written_by_nobody_else() {
        let (mine, fd) = LentMemory::create("test", 8192).unwrap();
        let theirs = LentMemory::open(&fd).unwrap();
        // SAFETY: both addresses lie in mappings of 8192 bytes.
        unsafe {
            mine.start().add(8191).write(7);
            assert_eq!(theirs.at(8191, 1).unwrap().read(), 7);
        }
        assert!(SharedMemory::map(&fd, 8192).is_err(), "no other mapping can write");
        assert!(rustix::io::pwrite(&fd, &[1], 0).is_err(), "nor can anyone write to the file");
        drop(mine);
        // SAFETY: as above.
        assert_eq!(unsafe { theirs.at(8191, 1).unwrap().read() }, 7, "it stays for those who look at it");
    }

    #[test]
    fn places_outside_lent_memory_are_none() {
        let (lent, _) = LentMemory::create("test", 8192).unwrap();
        let start = lent.start().cast_const();
        assert_eq!(lent.offset_of(start.wrapping_add(8000), 192), Some(8000));
        assert_eq!(lent.at(8000, 192), Some(start.wrapping_add(8000)));
        for (offset, bytes) in [(8000, 193), (8193, 0), (usize::MAX, 1), (1, usize::MAX)] {
            assert_eq!(lent.at(offset, bytes), None, "{offset} {bytes}");
            assert_eq!(lent.offset_of(start.wrapping_add(offset), bytes), None, "{offset} {bytes}");
        }
        let open = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, 4096).unwrap();
        assert!(LentMemory::open(&open).unwrap_err().to_string().contains("not sealed"));
    }
}
