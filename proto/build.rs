//! Compiles the schema with protox: no `protoc` is needed.

use prost::Message;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let schema = protox::compile(["data.proto", "program.proto", "control.proto"], ["proto"])?;
    // `file_descriptor_set_path` writes nothing when the set is given.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("schema.bin"), schema.encode_to_vec())?;
    // A generated `connect(address)` would clash with the method of that name.
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".mesh.data.v1.Frame")
        .bytes(".mesh.control.v1")
        .compile_fds(schema)?;
    Ok(())
}
