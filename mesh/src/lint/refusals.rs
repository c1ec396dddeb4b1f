//! Layouts that are refused: the errors of [`crate::error`] that concern meshes, layouts and memory.

use super::{Check, Example, Lint, Severity, example};
use crate::dim::{DType, dim};
use crate::graph::Graph;
use crate::program::Init;

fn dense(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 32)]); // L0002 L0003 L0007
    let w = g.variable("w", &[dim("d_in", 32), dim("d_out", 32)], Init::zeros()); // L0005
    g.output("y", &x.contract(&w, &["d_in"]).sum_all());
}

const DENSE: &str = "a dense layer `[batch:64, d_in:32] x [d_in:32, d_out:32]`";

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
         the same bits on every layout. Use a smaller axis, or split another dimension as well.",
        of("data=16", "batch:data"),
        of("data=8,model=1", "batch:data"),
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
