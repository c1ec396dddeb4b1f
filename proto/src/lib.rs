//! The wire protocol between coordinator, workers and clients.
//!
//! | module | what it is |
//! |---|---|
//! | [`data`] | tensors between devices of different hosts |

/// Tensors between devices of different hosts (`mesh.data.v1`).
#[allow(missing_docs, clippy::undocumented_unsafe_blocks)]
pub mod data {
    tonic::include_proto!("mesh.data.v1");
}

/// The whole schema as an encoded `FileDescriptorSet`, for reflection.
pub const SCHEMA: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
