//! A file of tensors from a checkpoint: refused, or every tensor lies in it with the bytes that its shape has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::array::Array;
use mesh::dim::DType;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

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
    [one, some, vec![]].map(|tensors| safetensors::serialize(tensors, None).expect("a file")).into()
}

fuzz_target!(
    init: fuzz::seed("checkpoint", seeds()),
    |bytes: &[u8]| {
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
