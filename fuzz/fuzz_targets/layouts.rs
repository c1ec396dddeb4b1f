//! A mesh, a line's end, a layout: what is read is written as a text that reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::layout::{Layout, Mesh};

fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "data=2, x=2, y=2\nbatch:data, x:x, y:y, d_ff:model",
        "1\n",
        "a=8\nx:a?",
        "a=0\nx:a+b",
        "a=2,a=2\nx:a,x:b",
        "a=2\nslots{*:a,b.*/**{x:none}};/c{x:a}",
    ];
    texts.map(|t| t.into()).into()
}

fuzz_target!(
    init: fuzz::seed("layouts", seeds()),
    |text: &str| {
        let (mesh, layout) = text.split_once('\n').unwrap_or((text, ""));
        match mesh.parse::<Mesh>() {
            Ok(mesh) => {
                assert_eq!(mesh.to_string().parse::<Mesh>().expect("it reads back"), mesh);
                let last = mesh.coordinates(mesh.size() - 1);
                assert!(last.iter().zip(mesh.axes()).all(|(at, (_, size))| at + 1 == *size));
            }
            Err(e) => assert!(!e.to_string().is_empty()),
        }
        match layout.parse::<Layout>() {
            Ok(layout) => assert_eq!(layout.to_string().parse::<Layout>().expect("it reads back"), layout),
            Err(e) => assert!(!e.to_string().is_empty()),
        }
    }
);
