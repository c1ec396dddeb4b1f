//! The wire protocol between coordinator, workers and clients.
//!
//! | module | what it is |
//! |---|---|
//! | [`program`] | model programs as data |
//! | [`control`] | who is there, and what is to be done |
//! | [`data`] | tensors between devices of different hosts |

// Generated code finds other packages by their path.
#[allow(missing_docs, clippy::large_enum_variant)]
mod mesh {
    pub mod program {
        pub mod v1 {
            tonic::include_proto!("mesh.program.v1");
        }
    }
    pub mod control {
        pub mod v1 {
            tonic::include_proto!("mesh.control.v1");
        }
    }
    pub mod data {
        pub mod v1 {
            tonic::include_proto!("mesh.data.v1");
        }
    }
}

pub use mesh::control::v1 as control;
pub use mesh::data::v1 as data;
pub use mesh::program::v1 as program;

/// The whole schema as an encoded `FileDescriptorSet`, for reflection.
pub const SCHEMA: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
