//! Executes plans: kernels, collectives and their transports, data readers.
pub mod kernels;
pub mod pool;
