//! Planning: from a program and a layout to one static list of steps per device and function.
//!
//! [`fuse`] decides what is stored and what is computed inside the loops that use it; `band` finds steps that are done slice
//! by slice, without storing what is between them; `body` makes the loops,
//! `copies` and `exchange` the moves within and between devices; `overlap` lets these go on while other steps are done; [`memory`] gives every buffer its place; `function`
//! puts them together into [`step`]s, `device` each device's, and `timeline` says what is in memory at each; [`cost`] says what each takes, and [`time`] how long a machine needs; [`describe`] is a plan
//! as text, [`report`] as data, [`html`] as a page, and [`diff`] what two differ in; [`recompute`] chooses what a backward pass makes
//! again. The peak that a plan predicts is what execution uses, byte for byte, because execution has no other memory than
//! the plan's.

mod band;
mod body;
mod copies;
pub mod cost;
pub mod describe;
pub(crate) mod device;
pub mod diff;
pub(crate) mod exchange;
mod function;
pub mod fuse;
pub mod html;
pub mod memory;
mod overlap;
pub(crate) mod pieces;
pub mod recompute;
pub mod report;
pub mod step;
pub mod time;
mod timeline;

use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::gathers::{self, Gathers};
use crate::layout::{Layout, Mesh};
use crate::ops::Prim;
use crate::pipeline;
use crate::placement::{Placement, Subject};
use crate::program::{Function, Program};
use crate::spmd;
pub(crate) use exchange::{Together, all_reduce, kind};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
pub use step::{
    ALIGN, AllReduce, At, Backend, Band, Begun, BoxCopy, Buffer, CopyWork, DevicePlan, Epilogue, Exchange,
    ExchangeKind, Join, Label, Message, OpWork, Part, Piece, Segments, Share, SliceStep, Slices, Step, Wire, Work,
};
pub use timeline::{Alive, Timeline};

/// What a plan has to keep to.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Bytes of memory that each device may use; None for no limit.
    pub memory: Option<usize>,
    /// Devices there are, where that is given beside the mesh.
    pub devices: Option<usize>,
    /// Whether all steps stand alone and there are no bands, which changes no bit: for tests.
    pub apart: bool,
    /// Whether every collective is one step, in which its devices wait for each other, as few steps need to. That changes
    /// no bit, and no peak: for tests.
    pub waiting: bool,
}

/// The plans of all functions of a program over one set of variables.
#[derive(Clone, Debug)]
pub struct ProgramPlan {
    /// The mesh.
    pub mesh: Mesh,
    /// The layout.
    pub layout: Layout,
    /// By device: part held and buffer of each variable. The buffers lie at the start of the arena, for every function.
    pub variables: Vec<Vec<(Part, Buffer)>>,
    /// By function: the plan of each device.
    pub functions: BTreeMap<Name, Vec<DevicePlan>>,
    /// By function: the memory of each device over time.
    pub timelines: BTreeMap<Name, Vec<Timeline>>,
    /// Bytes that the backend needs on each device beside the arena.
    pub workspace_bytes: usize,
}

impl ProgramPlan {
    /// Bytes of the arena of a device: what its most demanding function uses.
    pub fn arena_bytes(&self, device: usize) -> usize {
        let variables = self.variables[device].iter().map(|(_, b)| b.offset + b.bytes.next_multiple_of(ALIGN)).max();
        self.functions.values().map(|f| f[device].arena_bytes).max().unwrap_or(0).max(variables.unwrap_or(0))
    }
    /// The predicted peak of a device in bytes: its arena and the workspaces of its threads.
    pub fn peak_bytes(&self, device: usize) -> usize {
        self.arena_bytes(device) + self.workspace_bytes
    }

    /// Whether every device keeps to a budget; names what the fullest one holds if not.
    fn check_memory(&self, budget: usize) -> Result<(), Error> {
        let needs =
            self.functions.iter().flat_map(|(n, f)| f.iter().enumerate().map(move |(d, p)| (p.arena_bytes, n, d)));
        // Of equals, the first.
        let Some((arena, name, device)) = needs.rev().max_by_key(|(arena, _, _)| *arena) else { return Ok(()) };
        let needed = arena + self.workspace_bytes;
        if needed <= budget {
            return Ok(());
        }
        let largest = self.timelines[name][device].largest.iter().take(3);
        let largest = largest.map(|a| (a.name.clone(), a.bytes, a.place)).collect();
        let e = Error::from(Cause::OverMemory { device, needed, budget, largest });
        Err(e.note(format!(
            "in function `{name}`, with {} for the workspaces of threads",
            describe::bytes(self.workspace_bytes)
        )))
    }
}

/// Holds back what no kernel takes yet: indexing and reductions of 16-bit floats.
fn in_f32(function: &Function) -> Result<(), Error> {
    for node in &function.nodes {
        let op = node.op.op();
        let takes = op.elementwise()
            || op.copies()
            || node.op.is_product()
            || matches!(node.op, Prim::Input(_) | Prim::Read(_) | Prim::Assign(_))
            || matches!(node.op, Prim::MaxPool(_) | Prim::MaxPoolGrad(_));
        let types = function.input_types(node);
        if let Some(half) = types.iter().find(|t| !takes && t.dtype.is_half()) {
            let what = format!("`{}` of {}", op.name(), half.dtype);
            let help = "cast its inputs to f32 and the result back".into();
            return Err(Error::from(Cause::NotYet { what, help }).at(node.place));
        }
    }
    Ok(())
}

/// Plans every function of a program.
///
/// # Errors
/// A layout that names what is not there or cannot be applied to some tensor; a mesh of another size than there are
/// devices; a device that would need more memory than it may use.
pub fn plan_program(
    program: &Program,
    mesh: &Mesh,
    layout: &Layout,
    options: &PlanOptions,
    backend: &dyn Backend,
) -> Result<ProgramPlan, Error> {
    if let Some(devices) = options.devices.filter(|d| *d != mesh.size()) {
        return Err(Cause::MeshSize { mesh: mesh.to_string(), size: mesh.size(), devices }.into());
    }
    layout.check(mesh, program)?;
    let placement = Placement::new(mesh, layout, program);
    let mut variables: Vec<Vec<(Part, Buffer)>> = vec![vec![]; mesh.size()];
    let mut base = vec![0; mesh.size()];
    for v in &program.variables {
        let (spec, ty) = (placement.spec(&Subject::variable(v))?, Arc::new(v.ty.clone()));
        for (d, region) in placement.regions(&v.ty, &spec).into_iter().enumerate() {
            let bytes = region.elements() * v.ty.dtype.bytes();
            variables[d].push((Part { ty: ty.clone(), region }, Buffer { offset: base[d], bytes }));
            base[d] += bytes.next_multiple_of(ALIGN);
        }
    }
    let workspace_bytes = backend.workspace_bytes();
    let mut out = ProgramPlan {
        mesh: mesh.clone(),
        layout: layout.clone(),
        variables,
        functions: BTreeMap::new(),
        timelines: BTreeMap::new(),
        workspace_bytes,
    };
    let mut rings = BTreeSet::new();
    for (name, function) in &program.functions {
        in_f32(function)?;
        let mut spmd = spmd::lower(function, &placement)?;
        if layout.gathers() == Gathers::Refuse {
            gathers::check(function, &spmd, &placement)?;
        }
        pipeline::order(&mut spmd, function, layout.schedule(), options.waiting);
        rings.append(&mut spmd.rings);
        let cx = function::Context {
            function,
            mesh,
            spmd: &spmd,
            variables: &out.variables,
            declared: &program.variables,
            base: &base,
            backend,
            apart: options.apart,
            waiting: options.waiting,
        };
        let (plans, timelines) = function::plan(&cx, 0..mesh.size()).into_iter().unzip();
        out.functions.insert(name.clone(), plans);
        out.timelines.insert(name.clone(), timelines);
    }
    spmd::check_rings(layout, &placement, &rings)?;
    match options.memory {
        Some(budget) => out.check_memory(budget).map(|()| out),
        None => Ok(out),
    }
}
