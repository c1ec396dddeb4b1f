//! Programs as messages: what is sent arrives, and what arrives from outside is refused or sound, never a panic.

use mesh::dim::{DType, dim};
use mesh::nn::{self, Dense, Kernel, Mode};
use mesh::ops::source::Distribution;
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use proptest::prelude::*;
use worker::wire::{decode, encode};

fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        g.grain("class", 3);
        let image = g.input("image", DType::F32, &[dim("x", 9), dim("y", 8), dim("channel", 2)]);
        let kernel = Kernel::new(&["x", "y"], 3).from_channel("channel");
        let x = nn::conv(&image, "conv", &kernel, &dim("channel", 4));
        let x = nn::batch_norm(&x, "norm", "channel", &nn::BatchNorm::default(), Mode::Train);
        let x = nn::dropout(&x.relu(), 0.8, Mode::Train).max_pool(&[Window::same("x", 9, 2, 2, 1)]);
        let x = x.pad("x", 1, 0, f64::NEG_INFINITY).maximum(&g.scalar(f32::MIN)).with_layout("y:a");
        let x = x.mul(&g.random(Distribution::Bernoulli(0.25), &[dim("y", 8)]));
        let (top, places) = x.top_k("y", &dim("k", 2));
        let loss = nn::dense(&top, "head", &["channel"], &[dim("class", 3)], &Dense::default()).square().mean_all();
        Optimizer::adam(1e-3).apply(g, &loss);
        g.output("loss", &loss);
        g.output("places", &places);
    })
    .unwrap();
    p.finish().unwrap()
}

#[test]
fn a_program_arrives_as_it_was_sent() {
    let p = program();
    let bytes = encode(&p).unwrap();
    let q = decode(&bytes).unwrap();
    assert_eq!(encode(&q).unwrap(), bytes);
    assert_eq!(q.chunking, p.chunking);
    for (name, f) in &p.functions {
        let g = &q.functions[name];
        assert_eq!(
            (f.nodes.len(), &f.inputs, &f.outputs, &f.assigns),
            (g.nodes.len(), &g.inputs, &g.outputs, &g.assigns)
        );
        for (a, b) in f.nodes.iter().zip(&g.nodes) {
            assert_eq!(
                (&a.op, &a.inputs, &a.ty, a.place, &a.scope, &a.layout, a.role),
                (&b.op, &b.inputs, &b.ty, b.place, &b.scope, &b.layout, b.role)
            );
        }
    }
}

#[test]
fn another_format_and_too_much_are_refused() {
    let refusal = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert!(refusal(&[]).contains("format 0"));
    assert!(refusal(&[0x08, 0x07]).contains("it is of format 7, and this program reads format 3"));
    assert!(refusal(b"not a program at all").contains("P0006"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn a_damaged_program_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), shorten in any::<bool>()) {
        thread_local!(static BYTES: Vec<u8> = encode(&program()).unwrap());
        let mut bytes = BYTES.with(Clone::clone);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = decode(&bytes);
    }

    #[test]
    fn digits_of_ops_that_are_changed_never_panic(at in any::<prop::sample::Index>(), digits in "[0-9]{1,10}") {
        thread_local!(static BYTES: Vec<u8> = encode(&program()).unwrap());
        let bytes = BYTES.with(Clone::clone);
        // A number of some op's JSON, replaced by one of the same length.
        let places: Vec<usize> = (1..bytes.len()).filter(|&i| bytes[i].is_ascii_digit() && bytes[i - 1] == b':').collect();
        let start = places[at.index(places.len())];
        let mut bytes = bytes;
        for (b, d) in bytes[start..].iter_mut().zip(digits.bytes()) {
            if !b.is_ascii_digit() {
                break;
            }
            *b = d;
        }
        let _ = decode(&bytes);
    }
}
