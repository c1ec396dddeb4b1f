//! Named tensors on a mesh of devices.
pub mod chunk;
pub mod rng;
