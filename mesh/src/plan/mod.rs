//! Planning: from a function and a layout to one static list of steps per device.

pub mod step;

use crate::dim::Name;
use crate::layout::Mesh;
use std::collections::BTreeMap;
pub use step::{
    ALIGN, AllReduce, Backend, BoxCopy, Buffer, CopyWork, DevicePlan, Exchange, ExchangeKind, Label, Message, OpWork,
    Part, Step, Wire, Work,
};

/// The plans of all functions of a program over one set of variables.
#[derive(Clone, Debug)]
pub struct ProgramPlan {
    /// The mesh.
    pub mesh: Mesh,
    /// By device: part held and buffer of each variable. The buffers lie at the start of the arena, for every function.
    pub variables: Vec<Vec<(Part, Buffer)>>,
    /// By function: the plan of each device.
    pub functions: BTreeMap<Name, Vec<DevicePlan>>,
}

impl ProgramPlan {
    /// Bytes of the arena of a device: what its most demanding function uses.
    pub fn arena_bytes(&self, device: usize) -> usize {
        self.functions.values().map(|f| f[device].arena_bytes).max().unwrap_or(0)
    }
}
