//! Named tensors on a mesh of devices.
//!
//! A model program builds functions of a [`graph`] with named dimensions ([`dim`]) from primitive [`ops`] (what an op
//! is: [`op`]) and layers ([`nn`]); `Graph::gradients` adds the backward pass, [`optim`] the update; [`program`] holds
//! the functions and their variables. [`reference`] evaluates a function by scalar loops: it defines what everything
//! means. A [`layout`] maps dimension names to the axes of a mesh, and [`placement`] says who owns what by it; [`spmd`]
//! lowers a function to one list of instructions for all devices, [`gathers`] refuses what a layout did not ask for, and
//! [`pipeline`] says in which order stages work; [`plan`] fuses and orders it and gives every buffer its place. [`lint`] says what a layout costs that it need not. [`chunk`],
//! [`region`] and [`rng`] are what makes the result independent of the layout. A [`machine`] says how fast all that would
//! be, and [`search`] looks for the layout that is fastest. Nothing here does I/O.

pub mod array;
pub mod body;
pub mod chunk;
pub mod dim;
pub mod error;
pub mod gathers;
pub mod graph;
mod hash;
pub mod layout;
pub mod lint;
pub mod machine;
pub mod nn;
pub mod op;
pub mod ops;
pub mod optim;
pub mod pipeline;
pub mod placement;
pub mod plan;
pub mod program;
pub mod reference;
pub mod region;
pub mod rng;
pub mod search;
pub mod spmd;
