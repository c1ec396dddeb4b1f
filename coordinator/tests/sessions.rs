//! Sessions: what they keep, what they refuse, and how they say so.

mod common;

use common::run::{LAYOUTS, SIZES, batch, session, text, train};
use common::{f32s, i32s};
use mesh::array::Array;
use mesh::dim::{Name, dim};

#[test]
fn sessions_on_three_and_five_devices_hold_uneven_parts() {
    for ((mesh, layout), parts) in LAYOUTS[1..3].iter().zip([vec![3, 4, 3], vec![2, 3, 1, 2, 2]]) {
        let mut s = session(mesh, layout);
        train(&mut s, 0, 2);
        let devices = &s.plan().functions[&Name::from("train")];
        let held: Vec<usize> = devices.iter().map(|d| d.inputs[0].1.region.shape()[0]).collect();
        assert_eq!(held, parts, "rows of the batch by device");
        assert_eq!(s.peaks().unwrap().len(), parts.len());
    }
}

#[test]
fn feeds_and_names_that_are_wrong_are_errors_with_the_nearest_name() {
    let mut s = session("a=2", "batch:a");
    let (image, labels) = (f32s(&batch(), 1).1, i32s(&batch()[..1], 2, 5).1);
    let mut run = |feeds: &[(&str, &Array)]| text(s.run("train", 0, feeds));
    assert_eq!(
        run(&[("imgae", &image), ("image", &image), ("labels", &labels)]),
        "error[P0004]: the function takes no feed `imgae`\n  help: did you mean `image`?"
    );
    assert_eq!(
        run(&[("image", &image)]),
        "error[P0004]: `train` is not fed `labels`\n  help: feed an array for each input"
    );
    let turned = f32s(&[dim("in", SIZES.0 + 1), dim("batch", 10)], 1).1;
    assert_eq!(
        run(&[("image", &turned), ("labels", &labels)]),
        "error[P0004]: feed `image` is f32[batch:10, in:10], and was given f32 of shape [11, 10]\n  help: give an array \
         of that type, its dimensions in that order"
    );
    assert!(
        run(&[("image", &image), ("labels", &image)]).contains("feed `labels` is i32[batch:10], and was given f32")
    );
    assert!(
        text(s.run("tarin", 0, &[])).contains("the program has no function `tarin`\n  help: did you mean `train`?")
    );
    let f = s.function("train").unwrap();
    assert!(text(s.fetch(f, "los")).ends_with("the function has no result `los`\n  help: did you mean `loss`?"));
    assert!(text(s.variable("first/kernal")).ends_with("help: did you mean `first/kernel`?"));
    let error = text(s.set_variable("first/kernel", &image));
    assert!(
        error.contains("variable `first/kernel` is f32[in:10, hidden:70], and was given f32 of shape [10, 10]"),
        "{error}"
    );
    // And it still runs.
    train(&mut s, 0, 1);
}

#[test]
fn a_variable_that_is_set_is_the_same_on_every_device() {
    let mut s = session("a=2,b=5", "hidden:a,batch:b");
    let value = f32s(&[dim("in", SIZES.0), dim("hidden", SIZES.1)], 9).1;
    s.set_variable("first/kernel", &value).unwrap();
    assert_eq!(s.variable("first/kernel").unwrap(), value);
    let mut whole = session("1", "");
    whole.set_variable("first/kernel", &value).unwrap();
    assert_eq!(train(&mut s, 0, 2), train(&mut whole, 0, 2));
}

/// The hash is that of names, types and bytes: any change of one element changes it.
#[test]
fn the_hash_of_the_variables_tells_them_apart() {
    let mut s = session("a=3", "batch:a");
    let before = s.variables_hash().unwrap();
    let name = Name::from("second/bias");
    let Array::F32(mut bias) = s.variable(&name).unwrap() else { unreachable!() };
    bias[[3]] += 1e-6;
    s.set_variable(&name, &Array::F32(bias)).unwrap();
    assert_ne!(s.variables_hash().unwrap(), before);
}
