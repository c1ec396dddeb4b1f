//! Bands: attention without its score matrix has the bits of attention with it, on every layout, and takes less memory.

mod common;

use common::{Draws, assert_bits_eq, assert_near, expected, f32s, grid, i32s, program};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Attention, Dense, Mode};
use mesh::plan::{PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::Program;
use worker::group::DeviceGroup;
use worker::kernels::kernel::CpuBackend;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    heads: usize,
    head: usize,
    queries: usize,
    /// Positions that they look at; those of the queries themselves if there are none.
    memory: Option<usize>,
    keep: f32,
    masked: bool,
    dtype: DType,
}

impl Case {
    fn feeds(&self) -> Vec<(Vec<Dim>, Array)> {
        let (batch, model) = (dim("batch", self.batch), dim("model", 12));
        let of = |n: usize, key: u32| f32s(&[batch.clone(), dim("seq", n), model.clone()], key);
        let mut feeds = vec![of(self.queries, 1)];
        feeds.extend(self.memory.map(|n| of(n, 2)));
        feeds.push(i32s(std::slice::from_ref(&batch), 3, self.memory.unwrap_or(self.queries) as i32));
        feeds
    }

    fn attention(&self, g: &Graph, xs: &[Tensor]) -> Tensor {
        let memory = &xs[usize::from(self.memory.is_some())];
        let positions = memory.dim("seq");
        let mask = match self.masked {
            true => nn::attention_mask(&xs[xs.len() - 1].add(&g.scalar_i32(1)), &positions),
            false => g.scalar(0.0).broadcast(&[dim("batch", self.batch), positions]),
        };
        let options = Attention {
            heads: dim("heads", self.heads),
            head: dim("head", self.head),
            init: nn::init::glorot_uniform(12, 12),
            keep: self.keep,
        };
        let side = |x: &Tensor| x.cast(self.dtype);
        let y = nn::attention(&side(&xs[0]), &side(memory), &mask, "a", ["seq", "model"], &options, Mode::Train);
        y.cast(DType::F32)
    }

    /// The same in a layer that the backward pass makes again.
    fn recomputed(&self) -> Program {
        let layer = |g: &Graph, xs: &[Tensor]| {
            let x = g.recompute(|| nn::layer_norm(&self.attention(g, xs).add(&xs[0]), "norm", &["model"], 1e-5));
            nn::dense(&x, "out", &["model"], &[dim("class", 3)], &Dense::default())
        };
        program(&self.feeds(), true, layer)
    }

    fn program(&self) -> Program {
        program(&self.feeds(), true, |g, xs| self.attention(g, xs))
    }

    /// Bytes of the scores.
    fn scores(&self) -> usize {
        4 * self.batch * self.heads * self.queries * self.memory.unwrap_or(self.queries)
    }
}

fn planned(p: &Program, mesh: &str, layout: &str, threads: usize, apart: bool) -> ProgramPlan {
    let options = PlanOptions { apart, ..PlanOptions::default() };
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    plan_program(p, &mesh, &layout, &options, &CpuBackend { threads }).unwrap_or_else(|e| panic!("{e}"))
}

fn bands(plan: &ProgramPlan) -> usize {
    let steps = &plan.functions[&Name::from("f")][0].steps;
    steps.iter().filter(|s| matches!(s.work, Work::Band(_))).count()
}

/// Runs `f` by a plan, after `init`.
fn run(plan: &ProgramPlan, feeds: &[(Vec<Dim>, Array)], threads: usize) -> Vec<(Name, Array)> {
    let mut group = DeviceGroup::embedded(plan, threads, 1).unwrap();
    let index = |name: &str| plan.functions.keys().position(|n| **n == *name).unwrap();
    group.run(index("init"), 0).unwrap();
    let f = &plan.functions[&Name::from("f")];
    for d in 0..plan.mesh.size() {
        for (i, (name, part, _)) in f[d].inputs.iter().enumerate() {
            let feed: usize = name[1..].parse().unwrap();
            group.device(d).feed(index("f"), i, &feeds[feed].1.part(&part.region));
        }
    }
    group.run(index("f"), 0).unwrap();
    let fetch = |(i, (name, part, _)): (usize, &(Name, mesh::plan::Part, _))| {
        let mut array = Array::zeros(part.ty.dtype, &part.ty.shape());
        (0..plan.mesh.size()).for_each(|d| group.device(d).fetch(index("f"), i, &mut array));
        (name.clone(), array)
    };
    let out = f[0].outputs.iter().enumerate().map(fetch).collect();
    for d in 0..plan.mesh.size() {
        let peak = group.device(d).peak();
        assert_eq!(peak.measured, peak.predicted, "device {d} of {}", plan.mesh);
    }
    out
}

fn cases(count: usize) -> Vec<Case> {
    let mut draw = Draws::new(31);
    let case = |i: usize| Case {
        batch: 2 + draw.below(3),
        heads: 2 + draw.below(3),
        head: [4, 7, 16, 20][draw.below(4)],
        queries: 40 + draw.below(50),
        memory: (i % 3 == 2).then(|| 33 + draw.below(60)),
        keep: [1.0, 0.8][draw.below(2)],
        masked: draw.below(3) > 0,
        dtype: [DType::F32, DType::Bf16][i % 2],
    };
    (0..count).map(case).collect()
}

#[test]
fn attention_in_bands_has_the_bits_of_attention_in_steps() {
    for case in cases(12) {
        let (p, feeds) = (case.program(), case.feeds());
        let steps = run(&planned(&p, "1", "", 1, true), &feeds, 1);
        let tolerance = if case.dtype == DType::F32 { 1e-4 } else { 5e-2 };
        assert_near(&format!("{case:?}"), &steps, &expected(&p, &feeds), tolerance);
        for threads in 1..=3 {
            let plan = planned(&p, "1", "", threads, false);
            assert_eq!(bands(&plan), 2, "{case:?}");
            assert_bits_eq(&format!("{case:?}"), &steps, &run(&plan, &feeds, threads), "one device in bands");
        }
    }
}

#[test]
fn attention_in_bands_has_the_same_bits_on_every_layout() {
    for case in cases(3) {
        let (p, feeds) = (case.program(), case.feeds());
        let steps = run(&planned(&p, "1", "", 1, true), &feeds, 1);
        let mut most = 0;
        for (i, (mesh, layout)) in grid(&p, "f").iter().enumerate() {
            let plan = planned(&p, mesh, layout, 1 + i % 2, false);
            most = most.max(bands(&plan));
            let split = run(&plan, &feeds, 1 + i % 2);
            assert_bits_eq(&format!("{case:?}"), &steps, &split, &format!("{mesh} with {layout}"));
        }
        assert_eq!(most, 2, "no layout has bands");
    }
}

#[test]
fn a_layer_that_is_made_again_has_bands_too() {
    for case in cases(4) {
        let (p, feeds) = (case.recomputed(), case.feeds());
        let steps = run(&planned(&p, "1", "", 1, true), &feeds, 1);
        let plan = planned(&p, "1", "", 2, false);
        assert_eq!(bands(&plan), 3, "{case:?}");
        assert_bits_eq(&format!("{case:?}"), &steps, &run(&plan, &feeds, 2), "one device in bands");
    }
}

/// Keys and values go round.
const RINGS: [(&str, &str); 5] = [
    ("sp=2", "seq:sp,memory_seq:ring(sp)"),
    ("sp=3", "seq:sp,memory_seq:ring(sp)"),
    ("sp=4", "seq:sp,memory_seq:ring(sp)"),
    ("data=2,sp=3", "batch:data,seq:sp,memory_seq:ring(sp)"),
    ("sp=2,model=2", "seq:sp,memory_seq:ring(sp),batch:model?"),
];

#[test]
fn attention_in_a_ring_has_the_bits_of_one_device_and_no_device_holds_all_keys() {
    for case in cases(6) {
        // Of so many chunks that four devices have one each.
        let case = Case { queries: case.queries + 100, memory: case.memory.map(|n| n + 100), ..case };
        // Three times forward, twice backward.
        let (p, passes) = (case.program(), 5);
        let feeds = case.feeds();
        let steps = run(&planned(&p, "1", "", 1, true), &feeds, 1);
        for (i, (mesh, layout)) in RINGS.into_iter().enumerate() {
            let plan = planned(&p, mesh, layout, 1 + i % 2, false);
            let around = plan.mesh.axes()[plan.mesh.axis("sp").unwrap()].1;
            assert_eq!(bands(&plan), passes * around, "{case:?} on {mesh}");
            let kinds = plan.functions[&Name::from("f")].iter().flat_map(|d| &d.steps).map(|s| &*s.label.op);
            assert!(kinds.into_iter().any(|kind| kind == "permute"), "{case:?} on {mesh}");
            let split = run(&plan, &feeds, 1 + i % 2);
            assert_bits_eq(&format!("{case:?}"), &steps, &split, &format!("{mesh} with {layout}"));
        }
    }
}

/// No step reads or writes anything as large as the scores, nor do the threads' slices take as much.
fn holds_no_scores(plan: &ProgramPlan, case: &Case) {
    for step in &plan.functions[&Name::from("f")][0].steps {
        let largest = step.inputs.iter().chain(&step.outputs).chain([&step.scratch]).map(|b| b.bytes).max();
        assert!(largest < Some(case.scores()), "{} {}: {largest:?} bytes", step.label.op, step.extent());
    }
}

#[test]
fn the_scores_are_not_in_the_plans_memory() {
    let case =
        Case { batch: 4, heads: 8, head: 4, queries: 200, memory: None, keep: 0.9, masked: true, dtype: DType::F32 };
    let (bands, steps) = (planned(&case.program(), "1", "", 2, false), planned(&case.program(), "1", "", 2, true));
    holds_no_scores(&bands, &case);
    let [bands, steps] = [bands, steps].map(|p| p.functions[&Name::from("f")][0].arena_bytes);
    assert!(steps > 2 * case.scores() && bands < case.scores() / 2, "{bands} and {steps}");
}

#[test]
fn scores_that_are_asked_for_are_stored() {
    let d = |name: &str| [dim("batch", 4), dim(name, 64), dim("head", 8)];
    let feeds = [f32s(&d("a"), 1), f32s(&d("b"), 2)];
    let p = program(&feeds, false, |g, xs| {
        let scores = xs[0].contract(&xs[1], &["head"]);
        g.output("scores", &scores);
        nn::softmax(&scores, &["b"]).contract(&xs[1], &["b"])
    });
    assert_eq!(bands(&planned(&p, "1", "", 1, false)), 0);
    // What nobody asks for is made in steps.
    let p = program(&feeds, false, |_, xs| {
        nn::softmax(&xs[0].contract(&xs[1], &["head"]), &["b"]).contract(&xs[1], &["b"]);
        xs[0].clone()
    });
    assert_eq!(bands(&planned(&p, "1", "", 1, false)), 0);
    // With more threads than slices, they share out each step.
    let p = program(&feeds, false, |_, xs| {
        nn::softmax(&xs[0].contract(&xs[1], &["head"]), &["b"]).contract(&xs[1], &["b"])
    });
    assert_eq!([1, 4, 5].map(|threads| bands(&planned(&p, "1", "", threads, false))), [1, 1, 0]);
}
