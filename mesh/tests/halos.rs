//! Where halos lie: apart from what a device has itself, if all that read them read rows that are whole.

use mesh::dim::{DType, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, Kernel};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::{ALIGN, Backend, Exchange, ExchangeKind, PlanOptions, ProgramPlan, Step, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};

struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

/// Convolutions, one of them strided and one transposed, to be trained.
fn network() -> Program {
    let space = ["x", "y", "z"];
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let image = [dim("batch", 2), dim("x", 32), dim("y", 24), dim("z", 8), dim("channel", 2)];
        let x = g.input("image", DType::F32, &image);
        let (kernel, to) = (Kernel::new(&space, 3).from_channel("channel"), dim("channel", 4));
        let x = nn::conv(&x, "first", &kernel, &to).relu();
        let down = nn::conv(&x, "down", &kernel.clone().stride(2), &to).relu();
        let double = Kernel::new(&space, 4).stride(2).to(&space.map(|d| x.dim(d).size)).from_channel("channel");
        let up = nn::conv_transpose(&down, "up", &double, &to).relu();
        let loss = (&up + &x).square().mean_all();
        Optimizer::sgd(0.1).apply(g, &loss);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

/// A convolution of `x`, and what is made of both.
fn forward(of: impl Fn(&Tensor, &Tensor) -> Tensor) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("forward", |g| {
        let x = g.input("image", DType::F32, &[dim("x", 16), dim("y", 16), dim("channel", 4)]);
        let (x, kernel) = ((&x * 2.0).relu(), Kernel::new(&["x", "y"], 3).unbiased().from_channel("channel"));
        g.output("y", &of(&x, &nn::conv(&x, "conv", &kernel, &dim("channel", 4))));
    })
    .unwrap();
    p.finish().unwrap()
}

fn planned(program: &Program, mesh: &str, layout: &str) -> ProgramPlan {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    plan_program(program, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap()
}

/// All exchanges of halos, on all devices.
fn halos(plan: &ProgramPlan) -> Vec<(&Step, &Exchange)> {
    let steps = plan.functions.values().flatten().flat_map(|d| &d.steps);
    let halo = steps.filter_map(|s| match &s.work {
        Work::Exchange(e) => (e.kind == ExchangeKind::Halo).then_some((s, &**e)),
        _ => None,
    });
    halo.collect()
}

/// Whether what a device has itself stays where it is: it keeps nothing then, and has room for what it receives, no more.
fn is_apart((step, e): &(&Step, &Exchange)) -> bool {
    let received: usize = e.recvs.iter().map(|m| m.bytes.next_multiple_of(ALIGN)).sum();
    e.local.is_empty() && step.outputs.iter().map(|b| b.bytes).sum::<usize>() == received
}

#[test]
fn convolutions_read_halos_where_they_come() {
    let program = network();
    for (mesh, layout) in [("x=2", "x:x"), ("x=2,y=2", "x:x,y:y"), ("y=3", "y:y"), ("data=1,x=4", "batch:data,x:x")] {
        let plan = planned(&program, mesh, layout);
        assert!(!halos(&plan).is_empty() && halos(&plan).iter().all(is_apart), "{layout} on {mesh}");
        // Each reads its own part behind its two factors.
        let ops = plan.functions.values().flatten().flat_map(|d| &d.steps).filter_map(|s| match &s.work {
            Work::Op(op) if !op.pieces.is_empty() => Some((s, op)),
            _ => None,
        });
        let mut read = 0;
        for (step, op) in ops {
            read += 1;
            let bytes = |n: usize| n * op.inputs[0].ty.dtype.bytes();
            let own = &op.pieces[0];
            assert_eq!((own.input, own.first, op.reads()), (2, 0, 3));
            assert_eq!(step.inputs[2].bytes, bytes(own.region.elements()));
            let all: usize = op.pieces.iter().map(|p| p.region.elements()).sum();
            assert_eq!(all, op.inputs[0].region.elements(), "pieces are all that is read, each once");
        }
        assert!(read >= halos(&plan).len(), "{read} convolutions read halos");
    }
    // Rows that are cut are put together.
    for (mesh, layout) in [("z=2", "z:z"), ("x=2,z=2", "x:x,z:z")] {
        let plan = planned(&program, mesh, layout);
        assert!(!halos(&plan).iter().any(is_apart), "{layout} on {mesh}");
    }
}

#[test]
fn what_is_not_read_by_rows_has_its_halo_beside_it() {
    let pool = |x: &Tensor| x.max_pool(&["x", "y"].map(|d| Window::same(d, 16, 3, 1, 1)));
    let apart = |program: &Program| halos(&planned(program, "x=2", "x:x")).iter().map(is_apart).collect::<Vec<_>>();
    assert_eq!(apart(&forward(|_, y| y.clone())), [true, true]);
    // The pool has one of its own, on both devices.
    assert_eq!(apart(&forward(|x, y| &pool(x) + y)), [true, false, true, false]);
}

#[test]
fn a_residual_convolution_does_not_write_where_it_reads() {
    let plan = planned(&forward(|x, y| x + y), "x=2", "x:x");
    let steps = plan.functions.values().flatten().flat_map(|d| &d.steps);
    let reads = steps.filter(|s| matches!(&s.work, Work::Op(op) if !op.pieces.is_empty())).inspect(|s| {
        assert!(matches!(&s.work, Work::Op(op) if op.epilogue.is_some()), "the sum is the product's epilogue");
        assert!(s.outputs.iter().all(|b| !s.inputs.contains(b)), "{s:?}");
    });
    assert!(reads.count() > 0);
}
