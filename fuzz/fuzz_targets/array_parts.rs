//! The parts of a stream of arrays, each with its length before it: whatever comes together is of its head's size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::array::Array;
use mesh::dim::DType;
use prost::Message;
use proto::control::{ArrayName, ArrayPart};
use worker::wire::{Assembler, parts};

fn stream(array: &Array, start: &[usize]) -> Vec<u8> {
    let name = ArrayName { epoch: 3, function: "train".into(), name: "image".into() };
    parts(name, vec![1], start, array).flat_map(|p| p.encode_length_delimited_to_vec()).collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let array = |dtype: DType, shape: &[usize]| {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.bytes()];
        Array::from_bytes(dtype, shape, &bytes).expect("an array")
    };
    let scalar = stream(&array(DType::F32, &[]), &[]);
    let square = stream(&array(DType::I32, &[2, 2]), &[1, 0]);
    vec![[&scalar[..], &square].concat(), scalar, square]
}

fuzz_target!(
    init: fuzz::seed("array_parts", seeds()),
    |bytes: &[u8]| {
        let mut bytes = bytes;
        let mut assembler = Assembler::default();
        while let Ok(part) = ArrayPart::decode_length_delimited(&mut bytes) {
            match assembler.take(part) {
                Ok(Some((head, array))) => {
                    assert_eq!(array.shape(), head.shape.iter().map(|n| *n as usize).collect::<Vec<_>>());
                    assert_eq!(head.start.len(), head.shape.len());
                }
                Ok(None) => assert!(assembler.end().is_err()),
                Err(_) => break,
            }
            if bytes.is_empty() {
                break;
            }
        }
    }
);
