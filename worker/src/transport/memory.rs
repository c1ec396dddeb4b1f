//! Memory that processes share: a sealed memfd, mapped.

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A mapping. Other processes may write to it at any time: what is read from it is checked before it is used.
#[derive(Debug)]
pub(super) struct SharedMemory {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory that stays where it is until it is dropped; words are atomics, and the copies are
// ordered by them.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

/// Nobody can make the memory smaller under a mapping, which would kill whoever touches it.
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

impl SharedMemory {
    /// New memory, all zeros, and the descriptor to hand to others.
    pub fn create(name: &str, bytes: usize) -> io::Result<(SharedMemory, OwnedFd)> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
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
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address that the kernel picks; its size is sealed, so that it stays readable.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, fd.as_fd(), 0)? };
        NonNull::new(at.cast()).map(|at| SharedMemory { at, bytes }).ok_or_else(|| io::Error::other("no address"))
    }

    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset, "outside the shared memory");
        // SAFETY: inside the mapping.
        unsafe { self.at.as_ptr().add(offset) }
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

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size; whoever borrowed from it is gone.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.bytes) };
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
}
