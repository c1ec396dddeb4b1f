//! Messages arrive whole and in order, or all that wait for them hear why not.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use worker::transport::in_process::SMALL;

#[test]
fn messages_of_a_pair_arrive_in_order_while_all_devices_exchange_at_once() {
    let devices = 4;
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, devices);
        on_all(ends, |me, end| {
            for round in 0..100u64 {
                let out: Vec<[u64; 2]> = (0..devices as u64).map(|to| [me as u64 * 100 + to, round]).collect();
                let mut got = vec![[0u64; 2]; devices];
                // SAFETY: both arrays outlive `finish`.
                unsafe {
                    for peer in (0..devices).filter(|p| *p != me) {
                        for half in 0..2 {
                            end.send(0, peer, (&raw const out[peer][half]).cast(), 8).unwrap();
                            end.recv(0, peer, (&raw mut got[peer][half]).cast(), 8).unwrap();
                        }
                    }
                }
                end.finish(0).unwrap();
                for peer in (0..devices).filter(|p| *p != me) {
                    assert_eq!(got[peer], [peer as u64 * 100 + me as u64, round], "{kind:?}");
                }
            }
        });
    }
}

#[test]
fn messages_of_every_size_arrive_whole() {
    let sizes = [0, 1, 23, 24, 25, 4095, (64 << 10) - 1, 64 << 10, (1 << 20) + 1, (5 << 20) + 3, 20 << 20];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            for (round, bytes) in sizes.into_iter().enumerate() {
                all_to_all(end, me, 2, round, bytes).unwrap();
            }
        });
    }
}

#[test]
fn small_and_large_messages_of_a_pair_stay_in_order() {
    let sizes = [10, 200_000, 0, 64 << 10, 3, (64 << 10) + 4, (1 << 20) + 2, 70_001, 8];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            let of = |from: usize| sizes.iter().enumerate().map(move |(i, n)| pattern(from, 1 - from, i, *n));
            let out: Vec<Vec<u8>> = of(me).collect();
            let mut got: Vec<Vec<u8>> = sizes.iter().map(|n| vec![0; *n]).collect();
            for _ in 0..3 {
                // SAFETY: both lists outlive `finish`.
                unsafe {
                    for (out, got) in out.iter().zip(&mut got) {
                        end.send(0, 1 - me, out.as_ptr(), out.len()).unwrap();
                        end.recv(0, 1 - me, got.as_mut_ptr(), got.len()).unwrap();
                    }
                }
                end.finish(0).unwrap();
                assert!(got.iter().cloned().eq(of(1 - me)), "{kind:?}");
                got.iter_mut().for_each(|g| g.fill(0));
            }
        });
    }
}

#[test]
fn what_is_borrowed_lies_with_the_sender_or_in_the_scratch() {
    let sizes = [100, 64 << 10, 5, 3 << 20, (64 << 10) + 1];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        on_all(ends, |me, end| {
            let others: Vec<usize> = (0..3).filter(|p| *p != me).collect();
            for round in 0..3 {
                let mut scratch: Vec<Vec<u8>> = vec![];
                let mut out = vec![];
                // SAFETY: all lists outlive `finish`.
                unsafe {
                    for &peer in &others {
                        for bytes in sizes {
                            out.push(pattern(me, peer, round, bytes));
                            end.send(0, peer, out.last().unwrap().as_ptr(), bytes).unwrap();
                        }
                    }
                    for &peer in &others {
                        for bytes in sizes {
                            scratch.push(vec![0; bytes]);
                            end.borrow(0, peer, scratch.last_mut().unwrap().as_mut_ptr(), bytes).unwrap();
                        }
                    }
                }
                let lie = end.borrowed(0).unwrap().to_vec();
                assert_eq!(lie.len(), scratch.len());
                for (i, at) in lie.into_iter().enumerate() {
                    let (peer, bytes) = (others[i / sizes.len()], sizes[i % sizes.len()]);
                    // SAFETY: so many bytes lie there until `finish`.
                    let got = unsafe { std::slice::from_raw_parts(at, bytes) };
                    assert!(got == pattern(peer, me, round, bytes), "{kind:?}: {bytes} bytes");
                    let lends = matches!(kind, Kind::Lending | Kind::LendingSiblings);
                    let elsewhere =
                        kind == Kind::InProcess && bytes > SMALL || lends && bytes >= 64 << 10 && bytes % 4 == 0;
                    assert_eq!(at != scratch[i].as_ptr(), elsewhere, "{kind:?}: {bytes} bytes");
                }
                end.finish(0).unwrap();
            }
        });
    }
}

#[test]
fn what_is_lent_is_not_done_before_it_is_given_back() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        let given_back = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 1 << 20];
            // SAFETY: the memory outlives `finish`.
            unsafe {
                if me == 0 {
                    end.send(0, 1, memory.as_ptr(), memory.len()).unwrap();
                } else {
                    end.borrow(0, 0, memory.as_mut_ptr(), memory.len()).unwrap();
                    end.borrowed(0).unwrap();
                    std::thread::sleep(Duration::from_millis(50));
                    given_back.store(true, Ordering::SeqCst);
                }
            }
            end.finish(0).unwrap();
            assert!(given_back.load(Ordering::SeqCst), "{kind:?}");
        });
    }
}

#[test]
fn an_abort_reaches_whoever_waits_for_a_loan_to_be_given_back() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 1 << 20];
            // SAFETY: the memory outlives `finish` and `abort`.
            unsafe {
                if me == 0 {
                    end.send(0, 1, memory.as_ptr(), memory.len()).unwrap();
                } else {
                    end.borrow(0, 0, memory.as_mut_ptr(), memory.len()).unwrap();
                    end.borrowed(0).unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                    return end.abort("out of paper");
                }
            }
            let told = TransportError::Aborted { device: 1, reason: "out of paper".into() };
            assert_eq!(end.finish(0), Err(told), "{kind:?}");
        });
    }
}

#[test]
fn four_devices_with_more_on_the_way_than_any_buffer_holds_do_not_block_each_other() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 4);
        on_all(ends, |me, end| all_to_all(end, me, 4, 0, 12 << 20).unwrap());
    }
}

#[test]
fn an_abort_wakes_whoever_waits_also_behind_full_buffers() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 4);
        let told = Err(TransportError::Aborted { device: 2, reason: "out of paper".into() });
        on_all(ends, |me, end| {
            let (large, mut byte) = (vec![1u8; 20 << 20], 0u8);
            // SAFETY: the bytes outlive `finish` and `abort`.
            unsafe {
                match me {
                    // Wait for messages that never come, while others have sent more than fits.
                    0 => end.recv(0, 1, &raw mut byte, 1).unwrap(),
                    3 => end.recv(0, 0, &raw mut byte, 1).unwrap(),
                    // Waits for one that takes nothing.
                    1 => end.send(0, 3, large.as_ptr(), large.len()).unwrap(),
                    _ => {
                        std::thread::sleep(Duration::from_millis(50));
                        end.send(0, 0, large.as_ptr(), large.len()).unwrap();
                        std::thread::sleep(Duration::from_millis(50));
                        return end.abort("out of paper");
                    }
                }
            }
            assert_eq!(end.finish(0), told, "{kind:?}");
            assert_eq!(end.finish(0), told, "{kind:?}: it stays so");
        });
    }
}

#[test]
fn devices_of_different_plans_find_out() {
    for kind in KINDS {
        let (mut ends, _listeners) = ends(kind, 2);
        let (mut b, mut a) = (ends.pop().unwrap(), ends.pop().unwrap());
        let (out, mut got) = ([1u8; 4], [0u8; 8]);
        // SAFETY: both arrays outlive `finish`.
        unsafe {
            a.send(0, 1, out.as_ptr(), 4).unwrap();
            b.recv(0, 0, got.as_mut_ptr(), 8).unwrap();
        }
        if kind != Kind::InProcess {
            a.finish(0).unwrap();
        }
        let found = b.finish(0);
        assert_eq!(found, Err(TransportError::Disagreement { me: 1, peer: 0, expected: 8, sent: 4 }), "{kind:?}");
    }
}

#[test]
fn a_doom_stops_the_devices_of_its_process_and_they_tell_the_others() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        let (mine, doom) = (Doom::new(), Doom::new());
        let devices: Vec<Address> = listeners.iter().map(|l| l.address().clone()).collect();
        let run = |d: usize, doom: &Doom| {
            let roster = Roster { job: "test".into(), epoch: 1, devices: devices.clone(), mine: vec![d] };
            let mut end = listeners[d].connect(&roster, &options(choice), doom).unwrap().pop().unwrap();
            let mut byte = 0u8;
            // SAFETY: the byte outlives `finish`.
            unsafe { end.recv(0, 1 - d, &raw mut byte, 1).unwrap() };
            let e = end.finish(0).unwrap_err();
            end.abort(&e.to_string());
            e
        };
        std::thread::scope(|s| {
            let a = s.spawn(|| run(0, &mine));
            let b = s.spawn(|| run(1, &doom));
            std::thread::sleep(Duration::from_millis(100));
            doom.strike("the coordinator is gone");
            let doomed = TransportError::Doomed { me: 1, reason: "the coordinator is gone".into() };
            assert_eq!(a.join().unwrap(), TransportError::Aborted { device: 1, reason: doomed.to_string() });
            assert_eq!(b.join().unwrap(), doomed);
        });
    }
}
