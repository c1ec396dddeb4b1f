//! Programs and layouts that are refused: the errors of [`crate::error`].

use super::{Check, Example, Lint, Severity, example};
use crate::dim::{DType, dim};
use crate::graph::Graph;
use crate::optim::Optimizer;
use crate::program::Init;

fn dense(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 32)]); // L0002 L0003 L0007
    let w = g.variable("w", &[dim("d_in", 32), dim("d_out", 32)], Init::zeros()); // L0005
    g.output("y", &x.contract(&w, &["d_in"]).sum_all());
}

const UNLIKE: &str = "the sum of `[batch:64]` and `[batch:32]`";
fn unlike(g: &Graph) {
    let (x, y) = (g.input("x", DType::F32, &[dim("batch", 64)]), g.input("y", DType::F32, &[dim("batch", 32)]));
    g.output("z", &x.add(&y)); // P0001
}
fn alike(g: &Graph) {
    let (x, y) = (g.input("x", DType::F32, &[dim("batch", 64)]), g.input("y", DType::F32, &[dim("batch", 64)]));
    g.output("z", &x.add(&y));
}

fn shared(g: &Graph, second: usize) {
    let first = g.variable("w", &[dim("d", 32)], Init::zeros());
    let second = g.variable("w", &[dim("d", second)], Init::zeros()); // P0002
    g.output("y", &first.sum_all().add(&second.sum_all()));
}
fn two_types(g: &Graph) {
    shared(g, 64);
}
fn one_type(g: &Graph) {
    shared(g, 32);
}

fn two_inputs(g: &Graph, second: &str) {
    let x = g.input("x", DType::F32, &[dim("d", 32)]);
    let y = g.input(second, DType::F32, &[dim("d", 32)]); // P0003
    g.output("z", &x.add(&y));
}
fn one_name(g: &Graph) {
    two_inputs(g, "x");
}
fn two_names(g: &Graph) {
    two_inputs(g, "y");
}

fn trained(g: &Graph, scalar: bool) {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("d", 32)]);
    let w = g.variable("w", &[dim("d", 32)], Init::zeros());
    let loss = x.contract(&w, &["d"]);
    Optimizer::sgd(0.1).apply(g, &if scalar { loss.mean_all() } else { loss }); // P0004
}
fn loss_of_each(g: &Graph) {
    trained(g, false);
}
fn mean_loss(g: &Graph) {
    trained(g, true);
}

const DENSE: &str = "a dense layer `[batch:64, d_in:32] x [d_in:32, d_out:32]`";

const TURNED: &str = "`x.tanh().rename(\"token\", \"other\")` of 1,024 tokens of 1,024";
fn turned(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("token", 1024), dim("d", 1024)]);
    g.output("y", &x.tanh().rename("token", "other").exp().sum_all()); // L0010
}

const fn refusal(
    code: &'static str,
    name: &'static str,
    about: &'static str,
    failing: Example,
    fixed: Example,
) -> Lint {
    Lint { code, name, severity: Severity::Error, about, failing, fixed, check: Check::Refusal }
}

const fn of(mesh: &'static str, layout: &'static str) -> Example {
    example(dense, DENSE, mesh, layout)
}

pub(super) const LINTS: &[Lint] = &[
    refusal(
        "L0001",
        "not-a-layout",
        "A text that is no mesh or layout. A mesh is a list of axes with their sizes, `data=2,x=2`; a layout is a list of \
         rules dimension:axis, `batch:data,x:x`.",
        of("data=2", "batch=data"),
        of("data=2", "batch:data"),
    ),
    refusal(
        "L0002",
        "unknown-axis",
        "A rule names an axis that the mesh does not have. It would split nothing, so it is taken for a mistake: name an \
         axis of the mesh, or take the rule out.",
        of("data=2", "batch:dta"),
        of("data=2", "batch:data"),
    ),
    refusal(
        "L0003",
        "unknown-dimension",
        "A rule names a dimension that no tensor of the program has. It would split nothing, so it is taken for a mistake: \
         name a dimension of the program, or take the rule out.",
        of("data=2", "bach:data"),
        of("data=2", "batch:data"),
    ),
    refusal(
        "L0004",
        "two-rules",
        "There are two rules for one dimension, and only one of them could count. Keep one.",
        of("data=2,model=2", "batch:data,batch:model"),
        of("data=2,model=2", "batch:data,d_out:model"),
    ),
    refusal(
        "L0005",
        "axis-twice",
        "Two dimensions of one tensor lie on one axis: devices along it would hold its diagonal alone. Give one of the \
         dimensions another axis, or that tensor rules of its own (`with_layout`).",
        of("model=2", "d_in:model,d_out:model"),
        of("model=2", "d_out:model"),
    ),
    refusal(
        "L0006",
        "mesh-size",
        "The mesh does not have as many places as there are devices. Make the sizes of its axes multiply to that number.",
        of("data=2", "batch:data").on(4),
        of("data=4", "batch:data").on(4),
    ),
    refusal(
        "L0007",
        "more-shards-than-chunks",
        "A dimension is split over more devices than it has chunks: the layout is finer than the units that sums are made \
         of, which the program fixes (at most 8 a dimension, and none smaller than its grain). That is what makes results \
         the same bits on every layout. Use a smaller axis, split another dimension as well, or give the program more \
         chunks, `--chunks 16`: that is another order of sums, and other bits.",
        of("data=16", "batch:data"),
        of("data=8,model=1", "batch:data"),
    ),
    refusal(
        "L0008",
        "unknown-scope",
        "A rule is for a scope in which the program has nothing. It would split nothing, so it is taken for a mistake. \
         Patterns are of whole paths: `decoder` and all below it is `decoder/**`.",
        of("data=2", "batch:data,decoder/**{d_out:data}"),
        of("data=2", "batch:data,w{*:data}"),
    ),
    refusal(
        "L0009",
        "no-such-stage",
        "A rule puts tensors at a place along an axis that the axis does not have: places are counted from 0. Use a place that \
         there is, or a mesh with more of them.",
        of("pipe=2", "@pipe:2"),
        of("pipe=2", "@pipe:1"),
    ),
    refusal(
        "L0010",
        "silent-gather",
        "A tensor that the layout splits would be gathered whole on every device, a MiB or more that each receives in every run, \
         and no rule asks for it. Split another dimension; or say that it is meant: `token:data?` for what may be whole where \
         it must, `token:none` in the scope that needs it whole, or `gathers:allow` for all of the layout. Gathers of variables, \
         of gradients and for updates are no matter here: rules for those trade memory for messages.",
        example(turned, TURNED, "data=4", "token:data"),
        example(turned, TURNED, "data=4", "token:data,other:data"),
    ),
    refusal(
        "L0011",
        "no-ring",
        "A rule such as `memory_seq:ring(sp)` lets blocks of a dimension go round in place of being gathered, and that cannot be: \
         no product gathers what is split so, or something needs all of what is made of it at once, such as a result, or an op \
         that does not go by blocks. Let it be gathered there, `memory_seq:sp?`.",
        of("data=2", "batch:ring(data)"),
        of("data=2", "batch:data?"),
    ),
    refusal(
        "P0001",
        "refused-inputs",
        "An op refuses its inputs: dimensions of one name and unlike sizes, one that is not there, a dtype that it does not \
         take. The error has the constraint of the op that is not kept.",
        example(unlike, UNLIKE, "1", ""),
        example(alike, "the sum of two `[batch:64]`", "1", ""),
    ),
    refusal(
        "P0002",
        "two-types",
        "A variable is declared twice with unlike types. A second declaration of one path is the same variable; give one of \
         them another name or scope if they are two.",
        example(two_types, "a variable `w` of `[d:32]`, and one of `[d:64]`", "1", ""),
        example(one_type, "both of `[d:32]`: one variable", "1", ""),
    ),
    refusal(
        "P0003",
        "two-of-a-name",
        "Two inputs, outputs or functions of a program have one name, or two axes of a mesh, or two blocks of a layout are \
         for the same tensors. Give one of them another name, or put the rules into one block.",
        example(one_name, "two inputs called `x`", "1", ""),
        example(two_names, "inputs called `x` and `y`", "1", ""),
    ),
    refusal(
        "P0004",
        "misused",
        "Something was fed, fetched, set or asked for that the program does not allow: a loss that has dimensions, an array \
         of another type than its input, an assignment to what is no variable. The error says what to do instead.",
        example(loss_of_each, "training by a loss of each `batch`", "1", ""),
        example(mean_loss, "training by their mean", "1", ""),
    ),
    refusal(
        "M0001",
        "over-memory",
        "A device would need more memory than it may use. The error names the largest tensors that are alive at the peak. \
         Split more dimensions, use a smaller batch, recompute blocks (`g.block`, `--recompute`), or allow more memory.",
        of("1", "").within(16 << 10),
        of("data=4", "batch:data").within(16 << 10),
    ),
];
