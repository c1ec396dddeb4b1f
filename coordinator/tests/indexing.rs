//! Split and merged dimensions, gather, scatter-add and top-k: near the reference, and the same bits on every layout.

mod common;

use common::{Draws, f32s, i32s, layouts, program, run, same_everywhere};
use mesh::array::Array;
use mesh::dim::{Dim, dim};
use mesh::graph::Tensor;

/// Indices in `-1 ..= n`: some of them outside.
fn rows(dims: &[Dim], key: u32, n: usize) -> (Vec<Dim>, Array) {
    let (dims, array) = i32s(dims, key, n as i32 + 2);
    match array {
        Array::I32(a) => (dims, Array::I32(a.mapv(|i| i - 1))),
        other => (dims, other),
    }
}

/// Some of the dimensions, in some order.
fn some(draw: &mut Draws, from: &[Dim]) -> Vec<Dim> {
    let mut out: Vec<Dim> = Vec::new();
    for d in from {
        if draw.below(2) == 0 {
            let at = draw.below(out.len() + 1);
            out.insert(at, d.clone());
        }
    }
    out
}

fn sizes(draw: &mut Draws, names: &[&str], most: usize) -> Vec<Dim> {
    names.iter().map(|n| dim(*n, 1 + draw.below(most))).collect()
}

fn texts(list: &[(String, String)]) -> Vec<(&str, &str)> {
    list.iter().map(|(m, l)| (m.as_str(), l.as_str())).collect()
}

#[test]
fn an_embedding_is_the_same_however_table_and_tokens_are_split() {
    let (vocab, d) = (dim("vocab", 11), dim("d", 6));
    let feeds = [f32s(&[vocab.clone(), d], 1), rows(&[dim("batch", 4), dim("seq", 5)], 2, 11)];
    let p = program(&feeds, true, |_, t| t[0].gather(&t[1], "vocab"));
    let layouts = [
        ("m=2", "vocab:m"),
        ("m=3", "vocab:m"),
        ("m=4", "vocab:m"),
        ("m=3", "d:m"),
        ("m=3", "batch:m"),
        ("m=4", "seq:m"),
        ("m=2,n=2", "vocab:m,d:n"),
        ("m=3,n=2", "batch:m,vocab:n"),
        ("m=2,n=3", "batch:m,seq:n"),
        ("m=2,n=3,k=2", "batch:m,vocab:n,d:k"),
    ];
    same_everywhere("embedding", &p, &feeds, &layouts, 1e-5);
}

#[test]
fn gathers_of_every_shape() {
    let mut draw = Draws::new(1);
    for case in 0..200 {
        let shared = sizes(&mut draw, &["b", "c"], 5);
        let (own, others) = (sizes(&mut draw, &["i", "j"], 5), sizes(&mut draw, &["r", "s"], 5));
        let v = dim("v", 1 + draw.below(12));
        let batch = some(&mut draw, &shared);
        let mut table = some(&mut draw, &[others, batch.clone()].concat());
        let at = draw.below(table.len() + 1);
        table.insert(at, v.clone());
        let indices = some(&mut draw, &[own, batch].concat());
        let all: Vec<Dim> = table.iter().chain(indices.iter().filter(|d| !table.contains(d))).cloned().collect();
        let mut feeds = vec![f32s(&table, 1), rows(&indices, 2, v.size)];
        let integers = case % 8 == 0;
        if integers {
            feeds[0] = i32s(&table, 1, i32::MAX);
        }
        let p = program(&feeds, !integers, |_, t| t[0].gather(&t[1], "v"));
        let layouts = layouts(&mut draw, &all, 3);
        same_everywhere(&format!("{table:?} at {indices:?}"), &p, &feeds, &texts(&layouts), 1e-5);
    }
}

#[test]
fn scatters_of_every_shape() {
    let mut draw = Draws::new(2);
    for case in 0..200 {
        let names = sizes(&mut draw, &["i", "j", "k"], 17);
        let indices = some(&mut draw, &names);
        let others = sizes(&mut draw, &["r", "s"], 5);
        let mut updates = some(&mut draw, &others);
        for d in &indices {
            let at = draw.below(updates.len() + 1);
            updates.insert(at, d.clone());
        }
        let rows_dim = dim("v", 1 + draw.below(9));
        let over = if case % 2 == 0 { indices.clone() } else { some(&mut draw, &indices) };
        let over: Vec<&str> = over.iter().map(|d| &*d.name).collect();
        let mut feeds = vec![f32s(&updates, 1), rows(&indices, 2, rows_dim.size)];
        let integers = case % 8 == 0;
        if integers {
            feeds[0] = i32s(&updates, 1, 1 << 20);
        }
        let p = program(&feeds, !integers, |_, t| t[0].scatter_add_over(&t[1], &rows_dim, &over));
        let all: Vec<Dim> = updates.iter().cloned().chain([rows_dim]).collect();
        let layouts = layouts(&mut draw, &all, 3);
        let what = format!("{updates:?} at {indices:?} over {over:?}");
        same_everywhere(&what, &p, &feeds, &texts(&layouts), 1e-4);
    }
}

#[test]
fn sums_of_negative_zeros_and_of_nothing_are_the_same_zero_everywhere() {
    let (n, r) = (dim("n", 16), dim("row", 4));
    let updates = ndarray::Array::from_shape_fn(16, |i| if i == 9 { 0.0f32 } else { -0.0 });
    // Row 0 has negative zeros alone, row 1 a positive one among them, row 2 nothing, row 3 one negative zero.
    let at = ndarray::Array::from_shape_fn(16, |i| if i == 15 { 3 } else { i32::from(i >= 8) });
    let feeds = [(vec![n.clone()], updates.into()), (vec![n], at.into())];
    let p = program(&feeds, false, |_, t| t[0].scatter_add(&t[1], &r));
    same_everywhere("zeros", &p, &feeds, &[("m=2", "n:m"), ("m=3", "n:m"), ("m=2,k=2", "n:m,row:k")], 0.0);
    assert!(run(&p, &feeds, "m=3", "n:m", 1)[0].1.to_bytes().iter().all(|b| *b == 0), "they are +0.0");

    let zeros = ndarray::Array::from_shape_fn(8, |i| [-0.0f32, 0.0, f32::NAN, -3.5][i % 4]);
    let feeds =
        [(vec![dim("v", 8)], zeros.clone().into()), (vec![dim("i", 8)], Array::from(ndarray::Array::from_iter(0..8)))];
    let p = program(&feeds, false, |_, t| t[0].gather(&t[1], "v"));
    for (mesh, layout) in [("1", ""), ("m=2", "v:m"), ("m=3", "v:m"), ("m=4", "i:m")] {
        let out = &run(&p, &feeds, mesh, layout, 1)[0].1;
        assert_eq!(
            out.to_bytes(),
            Array::from(zeros.clone()).to_bytes(),
            "elements come through as they are: {layout}"
        );
    }
}

#[test]
fn top_k_of_every_shape() {
    let mut draw = Draws::new(3);
    for case in 0..80 {
        let others = sizes(&mut draw, &["a", "b"], 5);
        let mut x = some(&mut draw, &others);
        let c = dim("class", 1 + draw.below(20));
        let at = draw.below(x.len() + 1);
        x.insert(at, c.clone());
        let k = dim("k", 1 + draw.below(c.size));
        let (_, values) = f32s(&x, 1);
        let Array::F32(values) = values else { unreachable!() };
        // Few different values, so that there are ties, and some out of the ordinary.
        let special = [f32::NEG_INFINITY, -3e9, -2e9, f32::INFINITY, 0.0, -0.0];
        let mut i = 0;
        let values = values.mapv(|v| {
            i += 1;
            if i % 3 == 0 { special[draw.below(special.len())] } else { (v * 4.0).round() }
        });
        let all: Vec<Dim> = x.iter().cloned().chain([k.clone()]).collect();
        let layouts = layouts(&mut draw, &all, 3);
        for indices in [false, true] {
            let feeds = [match case % 6 {
                0 => (x.clone(), Array::I32(values.mapv(|v| v as i32))),
                _ => (x.clone(), Array::F32(values.clone())),
            }];
            let top = |t: &Tensor| t.top_k("class", &k);
            let p =
                program(&feeds, case % 6 != 0 && !indices, |_, t| if indices { top(&t[0]).1 } else { top(&t[0]).0 });
            same_everywhere(&format!("{x:?} top {k:?}"), &p, &feeds, &texts(&layouts), 1e-5);
        }
    }
}

#[test]
fn split_and_merged_dimensions_in_chains() {
    let mut draw = Draws::new(4);
    for case in 0..200 {
        let factors = sizes(&mut draw, &["p", "q", "s"], 4);
        let n: usize = factors.iter().map(|d| d.size).product();
        let mut x = sizes(&mut draw, &["a", "b"], 4);
        let at = draw.below(3);
        x.insert(at, dim("d", n));
        let feeds = [f32s(&x, 1), f32s(&[factors[1].clone()], 2), f32s(&[dim("d", n)], 3)];
        let order: Vec<&str> = match case % 3 {
            0 => vec!["p", "q", "s"],
            1 => vec!["s", "p", "q"],
            _ => vec!["q", "p"],
        };
        let loose = case % 2 == 0;
        let p = program(&feeds, true, |_, t| {
            // With and without loops between, so that values lie in place of others and inside loops.
            let x = if loose { t[0].clone() } else { t[0].mul(&t[2]) };
            let split = x.split_dim("d", &factors);
            let moved = if loose { split.clone() } else { split.mul(&t[1]).add_scalar(0.5) };
            let merged = moved.merge_dims(&order, if case % 4 == 0 && order.len() == 3 { "d" } else { "e" });
            if loose && order.len() == 3 && case % 4 == 0 { merged.mul(&t[2]).add(&x) } else { merged.square() }
        });
        let all: Vec<Dim> = x.iter().chain(&factors).cloned().collect();
        // The one dimension and what it is made of, on the same axis and on others.
        let mut layouts = layouts(&mut draw, &all, 3);
        for f in &factors {
            if f.size > 1 {
                layouts.push(("m=2".into(), format!("d:m,{}:m", f.name)));
            }
        }
        if factors[0].size > 2 {
            layouts.push(("m=3".into(), "d:m,p:m".into()));
        }
        same_everywhere(&format!("{x:?} as {factors:?} to {order:?}"), &p, &feeds, &texts(&layouts), 1e-4);
    }
}

#[test]
fn heads_that_a_device_holds_whole_are_split_without_a_copy() {
    use mesh::layout::{Layout, Mesh};
    use mesh::plan::{PlanOptions, Work, plan_program};
    let feeds = [f32s(&[dim("batch", 4), dim("d_model", 64)], 1)];
    let p = program(&feeds, false, |_, t| {
        t[0].split_dim("d_model", &[dim("heads", 4), dim("d_head", 16)]).merge_dims(&["heads", "d_head"], "d_model")
    });
    let backend = worker::kernels::kernel::CpuBackend { threads: 1 };
    for (mesh, layout, free) in [("1", "", true), ("m=2", "d_model:m,heads:m", true), ("m=2", "heads:m", false)] {
        let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
        let plan = plan_program(&p, &mesh, &layout, &PlanOptions::default(), &backend).unwrap();
        let steps = &plan.functions[&"f".into()][0].steps;
        assert_eq!(steps.iter().all(|s| !matches!(s.work, Work::Copy(_) | Work::Exchange(_))), free, "{mesh} {layout}");
    }
}

#[test]
fn variables_are_updated_in_place_through_split_and_merged_dimensions() {
    use coordinator::{Options, Session};
    use mesh::program::{Init, ProgramBuilder};
    let (d, parts) = (dim("d", 12), [dim("p", 4), dim("q", 3)]);
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let v = g.variable("v", std::slice::from_ref(&d), Init::Constant(1.0));
        let w = g.variable("w", std::slice::from_ref(&d), Init::Constant(2.0));
        let ramp = g.iota(&parts[1]).cast(mesh::dim::DType::F32);
        let (split_v, split_w) = (v.split_dim("d", &parts), w.split_dim("d", &parts));
        // Each takes the other's old value, moved by one; what was read is fetched, split and merged again, unchanged.
        g.assign(&v, &split_w.shift("p", 1, true).add(&ramp).merge_dims(&["p", "q"], "d"));
        g.assign(&w, &split_v.merge_dims(&["p", "q"], "d").mul_scalar(2.0));
        g.output("old v", &split_v.merge_dims(&["p", "q"], "e").rename("e", "r"));
        g.output("old w", &split_w);
    })
    .unwrap();
    let p = p.finish().unwrap();
    let (mut v, mut w) = (vec![1.0f32; 12], vec![2.0f32; 12]);
    for (mesh, layout) in [("1", ""), ("m=2", "d:m,p:m"), ("m=4", "d:m,p:m"), ("m=3", "d:m"), ("m=3,n=2", "p:n,q:m")] {
        let options = Options {
            mesh: mesh.parse().unwrap(),
            layout: layout.parse().unwrap(),
            threads: Some(1),
            ..Options::default()
        };
        let mut session = Session::embedded(p.clone(), &options).unwrap();
        (v.fill(1.0), w.fill(2.0));
        for step in 0..3 {
            let out = session.run("f", step, &[]).unwrap();
            let old = |name: &str| out.iter().find(|(n, _)| *n == *name).unwrap().1.as_f32().unwrap().clone();
            assert_eq!(old("old v").into_raw_vec_and_offset().0, v, "{mesh} {layout}, step {step}");
            assert_eq!(old("old w").into_raw_vec_and_offset().0, w, "{mesh} {layout}, step {step}");
            (v, w) = ((0..12).map(|i| w[(i + 9) % 12] + (i % 3) as f32).collect(), v.iter().map(|v| v * 2.0).collect());
        }
    }
}

#[test]
fn wide_rows_and_long_results() {
    let (vocab, d) = (dim("vocab", 5), dim("d", 1100));
    let feeds = [f32s(&[vocab, d], 1), rows(&[dim("batch", 3), dim("seq", 9)], 2, 5)];
    let p = program(&feeds, true, |_, t| t[0].gather(&t[1], "vocab"));
    let layouts =
        [("m=2", "vocab:m"), ("m=3", "vocab:m"), ("m=3", "batch:m"), ("m=2,n=3", "batch:m,seq:n"), ("m=2", "d:m")];
    same_everywhere("wide", &p, &feeds, &layouts, 1e-4);
}
