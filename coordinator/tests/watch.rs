//! The first value that is not finite is named, on every mesh.

mod common;

use common::run::options;
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::program::{Init, Program, ProgramBuilder};
use ndarray::ArrayD;

fn dims() -> [Dim; 2] {
    [dim("x", 16), dim("y", 16)]
}

/// Where the logarithm stands.
const LINE: u32 = line!() + 9;

fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let w = g.variable("w", &[dim("y", 16), dim("z", 16)], Init::ones());
        let x = g.input("x", DType::F32, &dims());
        let y = g.scoped("outer", || {
            let product = x.contract(&w, &["y"]);
            g.scoped("deep", || product.add_scalar(16.5).log())
        });
        // What is stored is named; what is fused into a sum would go by its name.
        g.output("log", &y);
        g.output("y", &y.square().add_scalar(1.0).sum(&["z"]).sqrt());
    })
    .unwrap();
    p.finish().unwrap()
}

/// All of this value, but for one element.
fn feed(value: f32, odd: f32) -> Array {
    let mut x = ArrayD::from_elem(vec![16, 16], value);
    x[[13, 3]] = odd;
    x.into()
}

#[test]
fn the_op_that_first_gives_no_number_is_named_with_its_place_on_every_mesh() {
    for (mesh, layout) in [("1", ""), ("a=2,b=2", "x:a,z:b"), ("a=2,b=2", "x:a,y:b")] {
        let mut s = Session::embedded(program(), &options(mesh, layout)).unwrap();
        let run = |s: &mut Session, x: &Array| {
            s.run("f", 0, &[("x", x)]).unwrap();
            s.non_finite()
        };
        s.watch(true);
        assert!(run(&mut s, &feed(1.0, 2.0)).is_empty(), "{mesh}");
        let found = run(&mut s, &feed(1.0, -40.0));
        assert_eq!(found.len(), 1, "{mesh}: {found:?}");
        for text in ["outer/deep", &format!("tests/watch.rs:{LINE}"), "are no number"] {
            assert!(found[0].contains(text), "{mesh}: `{text}` in {found:?}");
        }
        // What is infinite before it is no number is told too; then it is over.
        s.watch(true);
        let found = run(&mut s, &feed(1.0, f32::INFINITY));
        assert!(found[0].contains("are infinite"), "{mesh}: {found:?}");
        s.watch(false);
        assert!(run(&mut s, &feed(1.0, -40.0)).is_empty(), "{mesh}");
        // A variable that is not finite before the step.
        s.set_variable("w", &ArrayD::from_elem(vec![16, 16], f32::NAN).into()).unwrap();
        s.watch(true);
        let found = run(&mut s, &feed(1.0, 2.0));
        assert!(found[0].contains("the variable `w`, before the step"), "{mesh}: {found:?}");
    }
}
