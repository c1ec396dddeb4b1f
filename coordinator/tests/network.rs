//! A training step of a small network with everything that a UNet has: near the reference in every variable, and the
//! same bits on every mesh.

mod common;

use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, Kernel};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use mesh::reference::{self, Values};

const SPACE: [&str; 2] = ["x", "y"];

fn block(x: &Tensor, name: &str, channels: usize) -> Tensor {
    x.graph().scoped(name, || {
        let kernel = Kernel::new(&SPACE, 3).from_channel("channel");
        let x = nn::conv(x, "conv", &kernel, &dim("channel", channels));
        nn::instance_norm(&x, "norm", "channel", &SPACE, 1e-5).relu()
    })
}

fn program(optimizer: &Optimizer) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        g.grain("class", 3);
        let space: Vec<Dim> = vec![dim("batch", 1), dim("x", 12), dim("y", 9)];
        let labels = g.input("labels", DType::I32, &space);
        let image = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat());
        let a = block(&image, "a", 4);
        let b = block(&a.max_pool(&SPACE.map(|d| Window::same(d, a.dim(d).size, 2, 2, 1))), "b", 6);
        let double = Kernel::new(&SPACE, 2).stride(2).to(&[12, 9]);
        let up = nn::conv_transpose(&b, "up", &double, &dim("channel", 4));
        let c = block(&Tensor::concat(&[&up, &a], "channel"), "c", 4);
        let logits = nn::conv(&c, "head", &Kernel::new(&SPACE, 1).from_channel("channel"), &dim("class", 3));
        let is_class = labels.equal(&g.iota(&dim("class", 3))).cast(DType::F32);
        let loss = nn::soft_dice_loss(&nn::softmax(&logits, &["class"]), &is_class, &SPACE);
        let update = optimizer.apply(g, &loss);
        g.output("loss", &loss);
        g.output("grad_norm", &update.grad_norm);
    })
    .unwrap();
    p.finish().unwrap()
}

fn feeds() -> [(&'static str, Array); 2] {
    let space = [dim("batch", 1), dim("x", 12), dim("y", 9)];
    let (_, labels) = common::i32s(&space, 1, 3);
    let (_, image) = common::f32s(&[&space[..], &[dim("channel", 1)]].concat(), 2);
    [("labels", labels), ("image", image)]
}

#[test]
fn training_steps_are_the_references_and_the_same_on_every_mesh() {
    let p = program(&Optimizer::sgd(0.1));
    let feeds = feeds();
    let train = |mesh: &str, layout: &str| {
        let options = Options {
            mesh: mesh.parse().unwrap(),
            layout: layout.parse().unwrap(),
            threads: Some(1),
            ..Options::default()
        };
        let mut s = Session::embedded(p.clone(), &options).unwrap();
        // Fed once: a feed stays for the steps to come.
        let f = s.function("train").unwrap();
        feeds.iter().for_each(|(name, array)| s.feed(f, name, array).unwrap());
        (0..3).for_each(|step| s.step(f, step).unwrap());
        s
    };
    let single = train("1", "");
    let mut variables = reference::init(&p, 0);
    let values: Values = feeds.iter().map(|(n, a)| (Name::from(*n), common::wide(a))).collect();
    for step in 0..3 {
        reference::run(&p, p.function("train").unwrap(), &values, &mut variables, 0, step);
    }
    for v in &p.variables {
        let got = common::wide(&single.variable(&v.name).unwrap());
        let worst = got.iter().zip(&variables[&v.name]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-4, "{}: off by {worst}\n{got}\n{}", v.name, variables[&v.name]);
    }
    for (mesh, layout) in [("x=2", "x:x"), ("y=3", "y:y"), ("x=2,y=2", "x:x,y:y"), ("x=3,y=2", "x:x,y:y")] {
        assert_eq!(train(mesh, layout).variables_hash().unwrap(), single.variables_hash().unwrap(), "{mesh}");
    }
}
