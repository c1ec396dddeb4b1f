//! What a peer may send: hellos, frames and the envelopes of messages. The first byte says which.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::data::frame::Kind;
use proto::data::{Abort, Answer, End, Frame, Hello, answer};
use worker::transport::link::Envelope;

fn seeds() -> Vec<Vec<u8>> {
    let hello =
        Hello { protocol: 1, build: "0.1.0".into(), job: "unet3d".into(), epoch: 3, from: 1, to: 0, window: 8 << 20 };
    let abort = Abort { device: 1, reason: "out of memory".into() };
    let kinds = [
        Kind::Hello(hello.clone()),
        Kind::Data(vec![7; 40].into()),
        Kind::Credit(2 << 20),
        Kind::Abort(abort),
        Kind::End(End { arrived: true }),
    ];
    let frames = kinds.map(|kind| Frame { kind: Some(kind) }.encode_to_vec()).map(|b| [&[0][..], &b].concat());
    let answer = Answer { kind: Some(answer::Kind::Refusal("device 3 is not here".into())) };
    let envelope = Envelope { epoch: 3, sequence: 9, length: 1 << 20, lent: Some(1 << 16) };
    let mut all = Vec::from(frames);
    all.push([&[1][..], &hello.encode_to_vec()].concat());
    all.push([&[2][..], &answer.encode_to_vec()].concat());
    all.push([&[3][..], &envelope.encode()].concat());
    all
}

/// What is decoded is the same after another journey.
fn travels<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let again = M::decode(&message.encode_to_vec()[..]).expect("what was encoded is decoded");
        assert_eq!(again, message);
    }
}

fuzz_target!(
    init: fuzz::seed("data_plane", seeds()),
    |bytes: &[u8]| {
        match bytes.split_first() {
            Some((0, frame)) => travels::<Frame>(frame),
            Some((1, hello)) => travels::<Hello>(hello),
            Some((2, answer)) => travels::<Answer>(answer),
            Some((_, envelope)) => {
                if let Some((envelope, _)) = envelope.split_first_chunk() {
                    assert_eq!(Envelope::decode(envelope).encode(), *envelope);
                }
            }
            None => {}
        }
    }
);
