//! Who connects to whom: epochs, versions, choices, places on a host.

use super::*;
use worker::transport::connector::{ConnectError, Version};

#[test]
fn listeners_serve_epoch_after_epoch_and_a_stale_one_is_refused() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        for epoch in [1, 2, 7] {
            let ends = connect(&listeners, epoch, choice, &Doom::new(), &[]).into_iter().map(Box::new).collect();
            on_all(ends, |me, end| all_to_all(end, me, 2, 0, 100_000).unwrap());
        }
        // A process that was away and has not heard of the new epoch.
        let old = listener();
        let devices = vec![listeners[0].address().clone(), old.address().clone()];
        let roster = |epoch, d| Roster { job: "test".into(), epoch, devices: devices.clone(), mine: vec![d] };
        match old.connect(&roster(3, 1), &options(choice), &Doom::new()).err() {
            Some(ConnectError::Refused { me: 1, peer: 0, reason, .. }) => {
                assert_eq!(reason, "epoch 3 of job `test` has passed; this process is in epoch 7");
            }
            other => panic!("{choice}: {other:?}"),
        }
        match listeners[0].connect(&roster(3, 0), &options(choice), &Doom::new()).err() {
            Some(ConnectError::Stale { epoch: 3, current: 7, .. }) => {}
            other => panic!("{choice}: {other:?}"),
        }
    }
}

#[test]
fn whoever_comes_early_waits_for_the_epoch() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        let devices: Vec<Address> = listeners.iter().map(|l| l.address().clone()).collect();
        let roster = |d| Roster { job: "test".into(), epoch: 4, devices: devices.clone(), mine: vec![d] };
        std::thread::scope(|s| {
            let early = s.spawn(|| listeners[1].connect(&roster(1), &options(choice), &Doom::new()).unwrap());
            std::thread::sleep(Duration::from_millis(150));
            listeners[0].connect(&roster(0), &options(choice), &Doom::new()).unwrap();
            early.join().unwrap();
        });
    }
}

#[test]
fn another_build_is_refused_with_both_versions() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let ours = listener();
        let version = Version { build: "0.0.9".into(), ..Version::default() };
        let theirs = ListenOptions { version, ..ListenOptions::default() };
        let theirs = Listener::bind(theirs, runtime().handle().clone()).unwrap();
        let devices = vec![ours.address().clone(), theirs.address().clone()];
        let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![1] };
        match theirs.connect(&roster, &options(choice), &Doom::new()).err() {
            Some(ConnectError::Refused { reason, .. }) => assert_eq!(
                reason,
                format!(
                    "build {} (data protocol 2) does not work with build 0.0.9 (data protocol 2); run the same build everywhere",
                    env!("CARGO_PKG_VERSION")
                )
            ),
            other => panic!("{choice}: {other:?}"),
        }
    }
}

#[test]
fn who_did_not_answer_is_named() {
    let l = listener();
    let nobody = Address { socket: "mesh-nobody".into(), grpc: "127.0.0.1:9".into(), ..l.address().clone() };
    let devices = vec![nobody.clone(), l.address().clone(), nobody];
    for (epoch, choice) in [(1, TransportChoice::Ring), (2, TransportChoice::Grpc)] {
        let roster = Roster { job: "test".into(), epoch, devices: devices.clone(), mine: vec![1] };
        let options = ConnectOptions { timeout: Duration::from_millis(300), ..options(choice) };
        let e = l.connect(&roster, &options, &Doom::new()).err().unwrap();
        let ConnectError::Unanswered { missing, .. } = &e else { panic!("{e}") };
        assert_eq!(missing.iter().map(|m| (m.me, m.peer)).collect::<Vec<_>>(), [(1, 0), (1, 2)]);
        let text = e.to_string();
        assert!(text.contains("device 0 at 127.0.0.1:9 (for device 1: "), "{text}");
        assert!(text.contains("refused"), "{text}");
        assert!(text.contains("device 2 at 127.0.0.1:9 (for device 1: it has not called)"), "{text}");
    }
}

#[test]
fn a_doom_ends_the_waiting_for_peers() {
    let l = listener();
    let roster = Roster {
        job: "test".into(),
        epoch: 1,
        devices: vec![l.address().clone(), listener().address().clone()],
        mine: vec![0],
    };
    let doom = Doom::new();
    std::thread::scope(|s| {
        let waits = s.spawn(|| l.connect(&roster, &options(TransportChoice::Auto), &doom).err());
        std::thread::sleep(Duration::from_millis(50));
        doom.strike("the job is over");
        let told = waits.join().unwrap();
        assert!(matches!(&told, Some(ConnectError::Doomed { reason }) if reason == "the job is over"), "{told:?}");
    });
}

#[test]
fn tensors_do_not_travel_in_the_clear_by_accident() {
    let open = ListenOptions { bind: ([0, 0, 0, 0], 0).into(), ..ListenOptions::default() };
    let bind = |options| Listener::bind(options, runtime().handle().clone());
    assert!(matches!(bind(open.clone()).err(), Some(ConnectError::Insecure { .. })));
    let advertised = |name: Option<&str>| {
        let options = ListenOptions { insecure: true, advertise: name.map(Into::into), ..open.clone() };
        bind(options).unwrap().address().grpc.clone()
    };
    assert!(advertised(Some("node7")).starts_with("node7:"));
    assert_eq!(advertised(Some("node7:80")), "node7:80");
    assert!(advertised(Some("fd00::7")).starts_with("[fd00::7]:"));
    assert!(!advertised(None).starts_with("0.0.0.0"));
}

#[test]
fn choices_are_spelled_as_they_are_read() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        assert_eq!(choice.to_string().parse(), Ok(choice));
    }
    assert!("tcp".parse::<TransportChoice>().is_err());
}

#[test]
fn a_device_knows_its_place_among_those_of_its_host() {
    let here = Address { host: "here".to_string().into(), socket: String::new(), grpc: String::new() };
    let there = Address { host: "there".to_string().into(), ..here.clone() };
    let devices = vec![here.clone(), there.clone(), there, here.clone(), here];
    let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![3] };
    assert_eq!([0, 1, 2, 3, 4].map(|d| roster.on_host(d)), [(0, 3), (0, 2), (1, 2), (1, 3), (2, 3)]);
}

#[test]
fn processes_with_several_devices_each_mix_links() {
    let listeners = [listener(), listener()];
    let of = [0, 1, 1, 0];
    let mut devices: Vec<Address> = of.iter().map(|l: &usize| listeners[*l].address().clone()).collect();
    // The second process claims to be elsewhere: rings inside, gRPC between.
    for d in [1, 2] {
        devices[d].host = "elsewhere".to_string().into();
    }
    std::thread::scope(|s| {
        for process in 0..2 {
            let mine: Vec<usize> = (0..4).filter(|d| of[*d] == process).collect();
            let roster = Roster { job: "test".into(), epoch: 1, devices: devices.clone(), mine };
            let listeners = &listeners;
            s.spawn(move || {
                let ends = listeners[process].connect(&roster, &options(TransportChoice::Auto), &Doom::new()).unwrap();
                std::thread::scope(|s| {
                    for mut end in ends {
                        s.spawn(move || {
                            let me = end.device();
                            (0..3).for_each(|round| all_to_all(&mut end, me, 4, round, 300_000).unwrap());
                        });
                    }
                });
            });
        }
    });
}
