//! A program from a client: refused, or as sound as one that was built here, and then it can be sent on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use worker::wire::{decode, encode};

fuzz_target!(
    init: fuzz::seed("program", fuzz::programs()),
    |bytes: &[u8]| {
        if let Ok(program) = decode(bytes) {
            let sent = encode(&program).expect("what was decoded is encoded");
            let again = decode(&sent).expect("what was encoded is decoded");
            assert_eq!(encode(&again).expect("as above"), sent);
        }
    }
);
