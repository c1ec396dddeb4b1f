//! Blocks that go round: no device holds all of them, and what would have to is refused.

mod common;

use common::{Plain, stepping};
use mesh::dim::{DType, dim};
use mesh::graph::{Graph, Tensor};
use mesh::layout::{Layout, Mesh};
use mesh::nn::{self, Attention, Mode};
use mesh::optim::Optimizer;
use mesh::placement::Placement;
use mesh::plan::{PlanOptions, plan_program};
use mesh::program::Program;
use mesh::spmd::{self, SpmdOp, SpmdProgram};

/// A step of attention, with its mask.
fn attention(seq: usize) -> Program {
    stepping(|g| {
        let (batch, seq) = (dim("batch", 2), dim("seq", seq));
        let x = g.input("x", DType::F32, &[batch.clone(), seq.clone(), dim("model", 32)]);
        let mask = nn::attention_mask(&g.input("lengths", DType::I32, &[batch]), &seq);
        let options = Attention {
            heads: dim("heads", 2),
            head: dim("head", 16),
            init: nn::init::glorot_uniform(32, 32),
            keep: 0.9,
        };
        let y = nn::attention(&x, &x, &mask, "attention", ["seq", "model"], &options, Mode::Train);
        Optimizer::sgd(0.1).apply(g, &y.square().mean_all());
    })
}

fn lowered(p: &Program, mesh: &str, layout: &str) -> SpmdProgram {
    let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    layout.check(&mesh, p).unwrap();
    spmd::lower(p.function("step").unwrap(), &Placement::new(&mesh, &layout, p)).unwrap()
}

/// The most positions of keys and values that a device has at a time of a value with a head's dimension.
fn most_held(spmd: &SpmdProgram) -> usize {
    let values = spmd.instrs.iter().map(|i| &spmd.values[i.output.index()]).filter(|v| v.ty.has("head"));
    let held = values.flat_map(|v| v.regions.iter().filter_map(|r| r.get("memory_seq")));
    held.map(|r| r.len()).max().unwrap()
}

#[test]
fn no_device_holds_keys_or_values_or_gradients_of_them_but_a_block() {
    let p = attention(256);
    for (sp, block) in [(2, 128), (3, 96), (4, 64), (8, 32)] {
        let mesh = format!("sp={sp}");
        assert_eq!(most_held(&lowered(&p, &mesh, "seq:sp,memory_seq:sp?")), 256);
        let spmd = lowered(&p, &mesh, "seq:sp,memory_seq:ring(sp)");
        assert_eq!(most_held(&spmd), block, "{mesh}");
        // Nodes of unfinished sums are joined as they come: a few wait, and not one a block.
        let joins = spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Join { .. }));
        let waiting = joins.flat_map(|i| spmd.values[i.output.index()].nodes.iter()).max().unwrap();
        assert!(*waiting <= 4, "{waiting} nodes wait on {mesh}");
    }
}

#[test]
fn blocks_go_round_five_times_and_gradients_go_to_their_owners() {
    let spmd = lowered(&attention(256), "sp=4", "seq:sp,memory_seq:ring(sp)");
    let of = |name: &'static str| {
        let moves = spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move));
        moves.map(|i| &spmd.values[i.output.index()]).filter(move |v| v.ty.has(name)).count()
    };
    // Keys five times, values three times, gradients of both once.
    assert_eq!(of("head"), (5 + 3 + 2) * 3);
    // The mask is gathered.
    assert_eq!(spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move)).count(), (5 + 3 + 2) * 3 + 1);
}

#[test]
fn a_longer_sequence_on_as_many_more_devices_takes_hardly_more_memory() {
    let peak = |sp: usize, rule: &str| {
        let (p, mesh) = (attention(512 * sp), format!("sp={sp}").parse().unwrap());
        let layout = format!("seq:sp,memory_seq:{rule}").parse().unwrap();
        let plan = plan_program(&p, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
        (0..sp).map(|d| plan.peak_bytes(d)).max().unwrap()
    };
    let [gathered, round] = ["sp?", "ring(sp)"].map(|rule| [2, 4, 8].map(|sp| peak(sp, rule)));
    assert!(gathered.iter().zip(&round).all(|(gathered, round)| round < gathered), "{gathered:?} and {round:?}");
    // Four times the sequence: keys, values and partial gradients of all of it, or some more nodes of sums that wait.
    assert!(2 * gathered[2] > 5 * gathered[0], "{gathered:?}");
    assert!(3 * round[2] < 5 * round[0], "{round:?}");
}

/// What is taken of weights `[a, memory]`, of which a product takes all of `memory`.
fn weights(take: impl Fn(&Graph, Tensor)) -> Program {
    stepping(|g| {
        let side = |name: &str, positions: &str| {
            g.input(name, DType::F32, &[dim("batch", 4), dim(positions, 64), dim("d", 8)]).tanh()
        };
        take(g, side("x", "a").contract(&side("y", "memory"), &["d"]));
    })
}

fn plan(p: &Program, layout: &str) -> Result<(), String> {
    let (mesh, layout) = ("sp=2".parse().unwrap(), layout.parse().unwrap());
    let plan = plan_program(p, &mesh, &layout, &PlanOptions::default(), &Plain);
    plan.map(|_| ()).map_err(|e| format!("{} {e}", e.cause.code()))
}

#[test]
fn what_needs_all_blocks_at_once_is_refused() {
    let rule = "a:sp,memory:ring(sp)";
    plan(&weights(|g, w| g.output("y", &w.exp().sum(&["memory"]))), rule).unwrap();
    let cases: [(&str, Program); 3] = [
        ("`exp` is a result, and needed whole", weights(|g, w| g.output("y", &w.exp()))),
        (
            "`shift` needs all of them at once",
            weights(|g, w| g.output("y", &w.shift("memory", 1, true).sum(&["memory"]))),
        ),
        ("no product gathers what is split along `memory`", {
            let shape = [dim("memory", 64)];
            stepping(move |g| g.output("y", &g.input("x", DType::F32, &shape).exp()))
        }),
    ];
    for (why, p) in cases {
        let layout = if why.starts_with("no") { "memory:ring(sp)" } else { rule };
        let e = plan(&p, layout).unwrap_err();
        assert!(e.starts_with("L0011") && e.contains("`memory:ring(sp)`") && e.contains(why), "{e}");
        plan(&p, &layout.replace("ring(sp)", "sp?")).unwrap();
    }
}
