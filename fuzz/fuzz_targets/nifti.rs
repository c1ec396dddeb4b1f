//! A volume from anywhere: refused, or with a voxel for everything that its header says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use worker::data::nifti::Volume;
use worker::data::volume::whole;

/// A file of 2 x 3 x 2 voxels: a header with what is looked at, and data.
fn volume(datatype: i16, bits: i16, big_endian: bool) -> Vec<u8> {
    let mut b = vec![0u8; 352];
    let mut field = |at: usize, little: &[u8]| {
        let mut bytes = little.to_vec();
        if big_endian {
            bytes.reverse();
        }
        b[at..at + bytes.len()].copy_from_slice(&bytes);
    };
    field(0, &348i32.to_le_bytes());
    for (i, d) in [3u16, 2, 3, 2, 1, 1, 1, 1].iter().enumerate() {
        field(40 + 2 * i, &d.to_le_bytes());
    }
    field(70, &datatype.to_le_bytes());
    field(72, &bits.to_le_bytes());
    for i in 0..4 {
        field(76 + 4 * i, &1.5f32.to_le_bytes());
    }
    for (at, value) in [(108, 352.0f32), (112, 2.0), (116, -1.0)] {
        field(at, &value.to_le_bytes());
    }
    field(254, &1i16.to_le_bytes());
    b[344..348].copy_from_slice(b"n+1\0");
    b.extend((0..12 * (bits as usize / 8)).map(|i| i as u8));
    b
}

fn seeds() -> Vec<Vec<u8>> {
    let kinds = [(2, 8), (4, 16), (8, 32), (16, 32), (64, 64)];
    kinds.iter().flat_map(|(t, bits)| [false, true].map(|big| volume(*t, *bits, big))).collect()
}

thread_local!(static FILE: File = tempfile::tempfile().expect("a file"));

fuzz_target!(
    init: fuzz::seed("nifti", seeds()),
    |bytes: &[u8]| {
        let file = FILE.with(|f| f.try_clone().expect("the file"));
        file.set_len(0).expect("a file that can be written");
        (&file).seek(SeekFrom::Start(0)).and_then(|_| (&file).write_all(bytes)).expect("a file that can be written");
        if let Ok(volume) = Volume::of(file, Path::new("fuzzed.nii")) {
            let shape = volume.shape();
            assert_eq!(shape.to_vec(), volume.header().dim[1..4].iter().map(|d| usize::from(*d)).collect::<Vec<_>>());
            assert!(shape.iter().product::<usize>() <= bytes.len());
            let whole = volume.read(&whole(shape)).expect("what it says that it has");
            let last = volume.read(&shape.map(|n| n - 1..n)).expect("the last voxel");
            assert_eq!(last[[0; 3]].to_bits(), whole[shape.map(|n| n - 1)].to_bits());
        }
    }
);
