//! Named tensors on a mesh of devices.
//!
//! A model program builds functions of a [`graph`] with named dimensions ([`dim`]) from primitive [`ops`] (what an op
//! is: [`op`]) and layers ([`nn`]); `Graph::gradients` adds the backward pass, [`optim`] the update; [`program`] holds
//! the functions and their variables. [`reference`] evaluates a function by scalar loops: it defines what everything
//! means. A [`layout`] maps dimension names to the axes of a mesh; [`spmd`] lowers function and layout to one list of
//! instructions for all devices; [`plan`] fuses and orders it and gives every buffer its place. [`lint`]
//! says what a layout costs that it need not, and [`report`] is a plan as data, a difference, or a page. [`chunk`], [`region`]
//! and [`rng`] are what makes the result independent of the layout. Nothing here does I/O.

pub mod array;
pub mod body;
pub mod chunk;
pub mod dim;
pub mod error;
pub mod graph;
pub mod layout;
pub mod lint;
pub mod nn;
pub mod op;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod program;
pub mod reference;
pub mod region;
pub mod report;
pub mod rng;
pub mod spmd;
