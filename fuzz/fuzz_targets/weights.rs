//! A folder of weights from anywhere, one file or an index of shards: refused, or every tensor has the values of its shape.
#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::tensor::{Dtype, TensorView};
use std::path::PathBuf;
use worker::data::weights::Weights;

fn scratch() -> PathBuf {
    std::env::temp_dir().join(format!("fuzz-weights-{}", std::process::id()))
}

fn file(dtype: Dtype, bytes: usize) -> Vec<u8> {
    let data = vec![1u8; 6 * bytes];
    let tensor = |shape: &[usize]| TensorView::new(dtype, shape.into(), &data).expect("a tensor");
    safetensors::serialize([("bert.a.weight", tensor(&[2, 3])), ("b", tensor(&[6]))], None).expect("a file")
}

fn seeds() -> Vec<Vec<u8>> {
    let index = br#"{"metadata": {"total_size": 48}, "weight_map": {"bert.a.weight": "shard", "b": "shard"}}"#;
    let files = [(Dtype::F32, 4), (Dtype::BF16, 2), (Dtype::F16, 2), (Dtype::I64, 8)].map(|(d, n)| file(d, n));
    files.into_iter().chain([index.to_vec()]).collect()
}

fuzz_target!(
    init: fuzz::seed("weights", seeds()),
    |bytes: &[u8]| {
        let folder = scratch();
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("a scratch folder");
        // JSON is taken for an index, with a good shard beside it.
        if bytes.first() == Some(&b'{') {
            std::fs::write(folder.join("model.safetensors.index.json"), bytes).expect("a scratch file");
            std::fs::write(folder.join("shard"), file(Dtype::F32, 4)).expect("a scratch file");
        } else {
            std::fs::write(folder.join("model.safetensors"), bytes).expect("a scratch file");
        }
        if let Ok(weights) = Weights::open(&folder) {
            for (name, stored) in weights.tensors() {
                if let Ok(array) = weights.read(name) {
                    assert_eq!(array.shape(), stored.shape);
                }
            }
        }
    }
);
