//! Tensors with their layout, and why each has it.

use crate::dim::{Name, Type};
use crate::error::{Error, Place};
use crate::graph::Node;
use crate::layout::{Layout, Placement};
use crate::ops::Prim;
use crate::plan::ProgramPlan;
use crate::program::{Function, Program};
use crate::region::Region;
use crate::spmd::{self, SpmdOp, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A tensor on the mesh.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorReport {
    /// Name of a variable, feed or result; for an activation its scope and op.
    pub name: String,
    /// `variable`, `feed`, `result` or `activation`.
    pub kind: String,
    /// Dtype and dimensions.
    #[serde(rename = "type")]
    pub ty: String,
    /// Scope in the program.
    pub scope: String,
    /// Place in the user's source.
    pub place: String,
    /// Bytes of all of it.
    pub bytes: usize,
    /// Bytes of the device that holds most.
    pub most_bytes: usize,
    /// Its dimensions in order.
    pub dims: Vec<DimLayout>,
    /// By device: the range of each dimension that it holds; of the first devices.
    pub blocks: Vec<Vec<(usize, usize)>>,
}

/// A dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DimLayout {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: usize,
    /// The axes it is split over, joined by `+`; none where it is whole.
    pub axes: Option<String>,
    /// Why it is.
    pub why: String,
}

/// Devices whose blocks are listed.
const LISTED: usize = 64;

/// Variables, feeds, results, and of each scope the largest activation.
pub(super) fn tensors(program: &Program, plan: &ProgramPlan, f: &Function) -> Result<Vec<TensorReport>, Error> {
    let placement = Placement { mesh: &plan.mesh, layout: &plan.layout, chunking: &program.chunking };
    let lowered = spmd::lower(f, &placement)?;
    let one = |name: String, kind: &str, regions: &[Region], of: Of| TensorReport {
        name,
        kind: kind.into(),
        ty: of.ty.to_string(),
        scope: of.scope.to_string(),
        place: of.place.to_string(),
        bytes: of.ty.bytes(),
        most_bytes: regions.iter().map(|r| r.elements() * of.ty.dtype.bytes()).max().unwrap_or(0),
        dims: dims(plan, &of, regions),
        blocks: regions.iter().take(LISTED).map(|r| r.0.iter().map(|(_, r)| (r.start, r.end)).collect()).collect(),
    };
    let mut out = vec![];
    for (i, v) in program.variables.iter().enumerate() {
        let regions: Vec<Region> = plan.variables.iter().map(|d| d[i].0.region.clone()).collect();
        let scope = v.name.rsplit_once('/').map_or("", |(scope, _)| scope).into();
        let of = Of { ty: &v.ty, scope: &scope, place: v.place, own: None, whole: vec![], op: "variable" };
        out.push(one(v.name.to_string(), "variable", &regions, of));
    }
    let value = |v: ValueId| &lowered.values[v.index()];
    let ends = lowered.inputs.iter().map(|e| ("feed", e)).chain(lowered.outputs.iter().map(|e| ("result", e)));
    for (kind, (name, v)) in ends {
        let node = f.node(value(*v).node);
        out.push(one(name.to_string(), kind, &value(*v).regions, Of::node(f, node)));
    }
    // Of each scope the largest value; those of a variable's dimensions are gradients and updates.
    let mut largest: BTreeMap<&Name, ValueId> = BTreeMap::new();
    let own = |ty: &Type| !program.variables.iter().any(|v| v.ty.dims == ty.dims);
    for i in lowered.instrs.iter().filter(|i| !matches!(i.op, SpmdOp::Move)) {
        let node = f.node(value(i.output).node);
        if node.scope.is_empty() || !own(&node.ty) || matches!(node.op, Prim::Input(_) | Prim::Read(_)) {
            continue;
        }
        let at = largest.entry(&node.scope).or_insert(i.output);
        if value(*at).ty.bytes() < node.ty.bytes() {
            *at = i.output;
        }
    }
    let mut activations: Vec<(u32, TensorReport)> = vec![];
    for (scope, v) in largest {
        let node = f.node(value(v).node);
        let name = format!("{scope}: {}", node.op.op().name());
        activations.push((value(v).node.0, one(name, "activation", &value(v).regions, Of::node(f, node))));
    }
    activations.sort_by_key(|(node, _)| *node);
    out.extend(activations.into_iter().map(|(_, t)| t));
    Ok(out)
}

/// What a layout depends on.
struct Of<'a> {
    ty: &'a Type,
    scope: &'a Name,
    place: Place,
    own: Option<&'a str>,
    whole: Vec<Name>,
    op: &'static str,
}

impl<'a> Of<'a> {
    fn node(f: &Function, node: &'a Node) -> Of<'a> {
        let op = node.op.op();
        let whole = op.whole(&f.input_types(node), &node.ty);
        Of { ty: &node.ty, scope: &node.scope, place: node.place, own: node.layout.as_deref(), whole, op: op.name() }
    }
}

fn dims(plan: &ProgramPlan, of: &Of, regions: &[Region]) -> Vec<DimLayout> {
    let one = |d: &crate::dim::Dim| {
        let axes: Vec<&str> = (0..plan.mesh.axes().len())
            .filter(|a| crate::lint::split_along(&plan.mesh, regions, *a).contains(&d.name))
            .map(|a| &*plan.mesh.axes()[a].0)
            .collect();
        let axes = (!axes.is_empty()).then(|| axes.join("+"));
        DimLayout { name: d.name.to_string(), size: d.size, why: why(plan, of, &d.name, axes.is_some()), axes }
    };
    of.ty.dims.iter().map(one).collect()
}

/// Why a dimension is split, or whole.
fn why(plan: &ProgramPlan, of: &Of, dim: &Name, split: bool) -> String {
    if of.whole.contains(dim) {
        return format!("`{}` needs it whole, whatever the layout says", of.op);
    }
    if let Some(own) = of.own {
        let rules: Option<Layout> = own.parse().ok();
        return match rules.as_ref().and_then(|r| r.axis_of(dim)) {
            Some(axis) => format!("the tensor's own rule `{dim}:{axis}` (`with_layout`)"),
            None => format!("the tensor's own rules `{own}` (`with_layout`) leave it whole"),
        };
    }
    match plan.layout.axis_of(dim) {
        Some(axis) if split => format!("the layout's rule `{dim}:{axis}`"),
        Some(axis) => format!("the layout's rule `{dim}:{axis}`, an axis of one device"),
        None => "no rule: whole on every device".into(),
    }
}
