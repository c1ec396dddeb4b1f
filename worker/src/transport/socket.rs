//! Messages with file descriptors, over the unix sockets on which processes of one host meet.
//!
//! A message is its length in four bytes, then the bytes; descriptors travel with its first byte.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Descriptors that a message carries at the most.
const DESCRIPTORS: usize = 3;
/// The longest message.
const LONGEST: usize = 4096;

/// Whether the other side runs as the same user as this process.
pub fn same_user(socket: &UnixStream) -> io::Result<bool> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid == rustix::process::getuid())
}

/// Sends a message. Messages are small: a socket that has no room for one belongs to a peer that does not listen.
pub fn send(socket: impl AsFd, message: &[u8], descriptors: &[&OwnedFd]) -> io::Result<()> {
    let length = u32::try_from(message.len()).ok().filter(|n| *n as usize <= LONGEST);
    let length = length.ok_or_else(|| io::Error::other("a message that is too long"))?.to_le_bytes();
    let borrowed: Vec<_> = descriptors.iter().map(|d| d.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let parts = [IoSlice::new(&length), IoSlice::new(message)];
    let sent = rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    if sent != 4 + message.len() {
        return Err(io::Error::other("the other side does not listen"));
    }
    Ok(())
}

/// Receives a message and the descriptors that came with it.
pub async fn receive(socket: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut bytes, mut found) = (Vec::new(), Vec::new());
    let mut wanted = 4;
    while bytes.len() < wanted {
        let mut buffer = [0u8; LONGEST];
        let part = &mut buffer[..wanted - bytes.len()];
        let n = socket.async_io(Interest::READABLE, || part_of(socket, part, &mut found)).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..n]);
        if wanted == 4 && bytes.len() == 4 {
            let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
            if length > LONGEST - 4 {
                return Err(io::Error::other(format!("a message of {length} bytes")));
            }
            wanted += length;
        }
    }
    bytes.drain(..4);
    Ok((bytes, found))
}

fn part_of(socket: &UnixStream, part: &mut [u8], found: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(part)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            found.extend(descriptors);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_and_long_ones_are_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (a, b) = UnixStream::pair().unwrap();
            let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::empty()).unwrap();
            send(&a, b"one", &[&fd]).unwrap();
            send(&a, b"", &[]).unwrap();
            send(&a, b"three", &[]).unwrap();
            let (bytes, found) = receive(&b).await.unwrap();
            assert_eq!((&bytes[..], found.len()), (&b"one"[..], 1));
            assert_eq!(receive(&b).await.unwrap().0, b"");
            assert_eq!(receive(&b).await.unwrap().0, b"three");
            assert!(send(&a, &[0; 5000], &[]).is_err());
            rustix::net::send(&a, &u32::MAX.to_le_bytes(), SendFlags::empty()).unwrap();
            assert!(receive(&b).await.unwrap_err().to_string().contains("4294967295 bytes"));
            assert!(same_user(&b).unwrap());
        });
    }
}
