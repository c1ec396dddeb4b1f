//! Kernels of the CPU backend. All of them keep to exact mode: an element's bits depend on the program alone, never on
//! the shard, the number of threads, the tile or the instruction set.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod band;
pub mod contract;
pub mod conv;
pub mod copy;
mod epilogue;
mod fold;
pub mod gather;
mod half;
pub mod isa;
pub mod join;
pub mod kernel;
mod lanes;
pub mod map;
pub mod math;
pub mod max_pool;
mod minimal;
mod native;
pub mod nest;
mod pack;
pub mod reduce;
pub mod roofline;
mod row_sums;
pub mod rows;
pub mod scatter_add;
pub mod tile;
pub mod top_k;
pub mod vm;
pub mod weight_grad;
