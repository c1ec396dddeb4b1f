//! A file of a checkpoint: refused, or what it says is within bounds. JSON is taken for a manifest, anything else for a
//! file of tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::array::Array;
use mesh::dim::DType;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use worker::checkpoint::{MANIFEST, Manifest, Part, Tensor, VERSION};
use worker::store::Store;

const FOLDER: &str = "step-00000020-epoch-3";

fn manifest() -> Vec<u8> {
    let part = Part { file: "shard".into(), start: vec![2, 0], shape: vec![2, 3], blake3: "00".into() };
    let manifest = Manifest {
        version: VERSION,
        folder: FOLDER.into(),
        step: 20,
        seed: 7,
        samples: 40,
        program: "00".into(),
        mesh: "x=2".into(),
        stage: String::new(),
        layout: "x:x".into(),
        config: Default::default(),
        files: [("shard".into(), 5)].into(),
        tensors: [("kernel".into(), Tensor { dtype: "f32".into(), shape: vec![4, 3], parts: vec![part] })].into(),
    };
    serde_json::to_vec(&manifest).expect("a manifest's text")
}

fn read_manifest(text: &[u8]) {
    // With its hash: what is looked at behind that counts here.
    let hash = blake3::hash(text).to_hex();
    let sealed = [format!("{{\"blake3\":\"{hash}\",\"manifest\":").as_bytes(), text, b"}"].concat();
    let store = Store::open("memory://fuzzed").expect("a store");
    for (file, bytes) in [(MANIFEST, sealed), ("shard", vec![0; 5])] {
        store.put(&format!("{FOLDER}/{file}"), &mut std::iter::once(bytes.into())).expect("memory");
    }
    if let Ok((manifest, _)) = Manifest::read(&store, FOLDER) {
        for tensor in manifest.tensors.values() {
            for part in &tensor.parts {
                assert!(part.start.iter().zip(&part.shape).zip(&tensor.shape).all(|((s, n), whole)| s + n <= *whole));
            }
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let data: Vec<u8> = (0..64).collect();
    let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.into(), &data[..bytes]).expect("a view");
    let one = vec![("kernel", view(Dtype::F32, &[2, 2, 3], 48))];
    let some = vec![
        ("layer/kernel", view(Dtype::F32, &[4, 4], 64)),
        ("layer/steps", view(Dtype::I32, &[], 4)),
        ("mask", view(Dtype::BOOL, &[7], 7)),
        ("nothing", view(Dtype::F32, &[0, 5], 0)),
    ];
    let files = [one, some, vec![]].map(|tensors| safetensors::serialize(tensors, None).expect("a file"));
    files.into_iter().chain([manifest()]).collect()
}

fuzz_target!(
    init: fuzz::seed("checkpoint", seeds()),
    |bytes: &[u8]| {
        if bytes.first() == Some(&b'{') {
            return read_manifest(bytes);
        }
        let Ok(file) = SafeTensors::deserialize(bytes) else { return };
        for (_, view) in file.tensors() {
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::I32 => DType::I32,
                Dtype::BOOL => DType::Bool,
                _ => continue,
            };
            let array = Array::from_bytes(dtype, view.shape(), view.data()).expect("as many bytes as the shape has");
            assert_eq!(array.shape(), view.shape());
        }
    }
);
