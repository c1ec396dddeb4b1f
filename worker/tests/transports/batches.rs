//! Several batches are under way at a time.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;
use worker::transport::in_process::SMALL;

/// Batches begin one after the other and end in another order; more is on the way than any buffer holds.
#[test]
fn several_batches_are_under_way_and_end_in_an_order_that_all_keep_to() {
    let sizes = [[8, 200_000, 0], [64 << 10, 3, 5 << 20], [SMALL, SMALL + 1, 70_000], [(1 << 20) + 4, 12, 64 << 10]];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        on_all(ends, |me, end| {
            let others: Vec<usize> = (0..3).filter(|p| *p != me).collect();
            for round in 0..3 {
                let of =
                    |from: usize, to: usize, b: usize, i: usize| pattern(from, to, round * 16 + b * 3 + i, sizes[b][i]);
                let (mut out, mut got) = (vec![], vec![vec![]; sizes.len()]);
                for (b, sizes) in sizes.iter().enumerate() {
                    for &peer in &others {
                        for (i, bytes) in sizes.iter().enumerate() {
                            out.push(of(me, peer, b, i));
                            // SAFETY: all lists outlive `finish`.
                            unsafe { end.send(b, peer, out.last().unwrap().as_ptr(), *bytes).unwrap() };
                        }
                    }
                    for &peer in &others {
                        for (i, bytes) in sizes.iter().enumerate() {
                            let mut memory = vec![0u8; *bytes];
                            // SAFETY: as above; what is pushed stays where its bytes lie.
                            unsafe {
                                match b % 2 {
                                    0 => end.recv(b, peer, memory.as_mut_ptr(), *bytes).unwrap(),
                                    _ => end.borrow(b, peer, memory.as_mut_ptr(), *bytes).unwrap(),
                                }
                            }
                            got[b].push((peer, i, memory));
                        }
                    }
                    end.progress().unwrap();
                }
                for b in [2, 1, 3, 0] {
                    if b % 2 == 1 {
                        for (at, (peer, i, memory)) in end.borrowed(b).unwrap().iter().zip(&got[b]) {
                            // SAFETY: so many bytes lie there until `finish`.
                            let found = unsafe { std::slice::from_raw_parts(*at, memory.len()) };
                            assert!(
                                found == of(*peer, me, b, *i),
                                "{kind:?}: message {i} of batch {b} from {peer} to {me}"
                            );
                        }
                        end.finish(b).unwrap();
                    } else {
                        end.finish(b).unwrap();
                        for (peer, i, memory) in &got[b] {
                            assert!(
                                *memory == of(*peer, me, b, *i),
                                "{kind:?}: message {i} of batch {b} from {peer} to {me}"
                            );
                        }
                    }
                }
            }
        });
    }
}

#[test]
fn a_loan_holds_up_its_own_batch_and_no_other() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        let told = mpsc::channel();
        let (tell, hear) = (std::sync::Mutex::new(Some(told.0)), std::sync::Mutex::new(told.1));
        let given_back = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 2 << 20];
            for batch in [1, 2] {
                // SAFETY: the memory outlives `finish`.
                unsafe {
                    let at = memory.as_mut_ptr().add((batch - 1) << 20);
                    match me {
                        0 => end.send(batch, 1, at, 1 << 20).unwrap(),
                        _ => end.borrow(batch, 0, at, 1 << 20).unwrap(),
                    }
                }
            }
            if me == 0 {
                // The later one is done first, while the earlier one is still looked at.
                end.finish(2).unwrap();
                drop(tell.lock().unwrap().take());
                end.finish(1).unwrap();
                assert!(given_back.load(Ordering::SeqCst), "{kind:?}");
            } else {
                end.borrowed(1).unwrap();
                end.borrowed(2).unwrap();
                end.finish(2).unwrap();
                let gone = hear.lock().unwrap().recv_timeout(Duration::from_secs(20));
                assert_eq!(gone, Err::<(), _>(mpsc::RecvTimeoutError::Disconnected), "{kind:?}");
                given_back.store(true, Ordering::SeqCst);
                end.finish(1).unwrap();
            }
        });
    }
}

#[test]
fn what_is_small_is_sent_before_anyone_takes_it() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        let sent = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut got = [[me as u8; SMALL]; 300];
            for (batch, at) in got.iter_mut().enumerate() {
                // SAFETY: the memory outlives `finish`.
                unsafe {
                    match me {
                        0 => end.send(batch, 1, at.as_ptr(), at.len()).unwrap(),
                        _ => end.recv(batch, 0, at.as_mut_ptr(), at.len()).unwrap(),
                    }
                }
            }
            if me == 0 {
                (0..300).for_each(|batch| end.finish(batch).unwrap());
                sent.store(true, Ordering::SeqCst);
            } else {
                let begun = Instant::now();
                while !sent.load(Ordering::SeqCst) && begun.elapsed() < Duration::from_secs(20) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(sent.load(Ordering::SeqCst), "{kind:?}");
                (0..300).for_each(|batch| end.finish(batch).unwrap());
                assert!(got.as_flattened().iter().all(|b| *b == 0), "{kind:?}");
            }
        });
    }
}

#[test]
fn an_abort_ends_all_batches_that_are_under_way() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        let told = Err(TransportError::Aborted { device: 2, reason: "out of paper".into() });
        on_all(ends, |me, end| {
            // More than any link takes while nobody reads it.
            let (large, mut got) = (vec![1u8; 12 << 20], vec![0u8; 12 << 20]);
            for batch in 0..3 {
                // SAFETY: the bytes outlive `finish` and `abort`.
                unsafe {
                    match me {
                        0 => end.send(batch, 1, large.as_ptr(), large.len()).unwrap(),
                        1 => end.borrow(batch, if batch == 0 { 0 } else { 2 }, got.as_mut_ptr(), got.len()).unwrap(),
                        _ => {}
                    }
                }
            }
            match me {
                2 => {
                    std::thread::sleep(Duration::from_millis(50));
                    end.abort("out of paper");
                }
                1 => {
                    let _ = end.borrowed(0);
                    assert_eq!(end.borrowed(1).map(|_| ()), told, "{kind:?}");
                    assert_eq!(end.finish(2), told, "{kind:?}");
                }
                _ => {
                    assert_eq!(end.finish(1), told, "{kind:?}");
                    assert_eq!(end.finish(2), told, "{kind:?}");
                }
            }
        });
    }
}
