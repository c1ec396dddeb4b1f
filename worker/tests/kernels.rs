//! Every kernel gives the same bits on every instruction set and with any number of threads, and writes nothing but
//! its results and its scratch.
//!
//! The pieces of work are those of planned programs, on one device and split, so that regions, halos, leaves and fused
//! bodies are as they come.

use mesh::body::{Body, Loop, Reduction};
use mesh::dim::{DType, Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Attention, BatchNorm, Dense, Kernel as Filter, Mode};
use mesh::op::Reference;
use mesh::ops::binary::{Binary, BinaryFn};
use mesh::ops::conv::Conv;
use mesh::ops::resize::Resize;
use mesh::ops::source::Distribution;
use mesh::ops::unary::{Unary, UnaryFn};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::{At, Backend, Epilogue, OpWork, Part, PlanOptions, Share, SliceStep, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};
use mesh::rng::Stream;
use std::collections::{BTreeMap, BTreeSet};
use worker::kernels::copy::CopyPlan;
use worker::kernels::isa::Isa;
use worker::kernels::kernel::{CpuBackend, Kernel, Operands};
use worker::kernels::vm::StepContext;
use worker::pool::Pool;
use worker::transport::InProcess;

/// Memory of a buffer, aligned as in an arena, with a guard on both sides.
struct Guarded {
    memory: Vec<[u64; 8]>,
    bytes: usize,
}

const GUARD: usize = 1024;
const PATTERN: u64 = 0xa5a5_a5a5_a5a5_a5a5;

impl Guarded {
    /// A buffer whose every byte is the guard's.
    fn new(bytes: usize) -> Guarded {
        // Lines of 64 bytes by number; the first whole one is found at run time.
        Guarded { memory: vec![[PATTERN; 8]; (bytes + 2 * GUARD).div_ceil(64) + 1], bytes }
    }
    fn start(&self) -> usize {
        GUARD + (self.memory.as_ptr() as usize).wrapping_neg() % 64
    }
    fn all(&self) -> &[u8] {
        // SAFETY: the vector's memory as bytes.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 64) }
    }
    fn at(&mut self) -> *mut u8 {
        let start = self.start();
        // SAFETY: inside the vector's memory.
        unsafe { self.memory.as_mut_ptr().cast::<u8>().add(start) }
    }
    fn data(&self) -> &[u8] {
        &self.all()[self.start()..self.start() + self.bytes]
    }
    fn fill(&mut self, data: &[u8]) {
        // SAFETY: the data's length is the buffer's.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.at(), self.bytes.min(data.len())) };
    }
    fn guarded(&self) -> bool {
        let (all, start) = (self.all(), self.start());
        all[..start].iter().chain(&all[start + self.bytes..]).all(|b| *b == PATTERN as u8)
    }
}

/// Numbers of a dtype, as bytes.
fn numbers(dtype: DType, bytes: usize, key: u32) -> Vec<u8> {
    let stream = Stream { seed: 11, step: 0, key };
    let draw = |i: usize| stream.uniform(i as u64);
    match dtype {
        DType::F32 => (0..bytes / 4).flat_map(|i| (draw(i) * 2.0 - 0.9).to_le_bytes()).collect(),
        DType::I32 => (0..bytes / 4).flat_map(|i| ((draw(i) * 9.0) as i32 - 2).to_le_bytes()).collect(),
        DType::Bf16 => {
            // Now and then a number whose products are subnormal, or that is itself.
            let scale = |i: usize, every| if i.is_multiple_of(every) { 1e-20 } else { 1.0 };
            let value = |i: usize| (draw(i) * 2.0 - 0.9) * scale(i, 7) * scale(i, 29);
            (0..bytes / 2).flat_map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes()).collect()
        }
        DType::F16 => {
            // Now and then a subnormal number, or a large one.
            let scale = |i: usize| if i.is_multiple_of(11) { 1e-6 } else { 1.0 };
            let scale = |i: usize| if i.is_multiple_of(17) { 30.0 } else { scale(i) };
            let value = |i: usize| half::f16::from_f32((draw(i) * 2.0 - 0.9) * scale(i));
            (0..bytes / 2).flat_map(|i| value(i).to_le_bytes()).collect()
        }
        DType::Bool => (0..bytes).map(|i| u8::from(draw(i) < 0.5)).collect(),
    }
}

/// The element types of what a piece of work reads.
fn dtypes(work: &Work) -> Vec<DType> {
    match work {
        Work::Map(nest) => nest.operands.iter().map(|o| o.dtype).collect(),
        Work::Reduce(r) => r.nest.operands.iter().map(|o| o.dtype).collect(),
        Work::Op(op) => {
            let mut types: Vec<DType> = op.inputs.iter().map(|p| p.ty.dtype).collect();
            types.resize(op.reads(), types[0]);
            if let Some(epilogue) = &op.epilogue {
                let operands = &epilogue.nest().operands;
                types.extend(operands[..operands.len() - 1].iter().map(|o| o.dtype));
            }
            types
        }
        Work::Band(band) => {
            let steps = band.slices.iter().flat_map(|s| &s.steps);
            let operand = |(at, dtype): (&At, DType)| match at {
                At::Outside { operand, .. } => Some((*operand, dtype)),
                At::Inside(_) => None,
            };
            let read = |s: &SliceStep| s.inputs.iter().zip(dtypes(&s.work)).filter_map(operand).collect::<Vec<_>>();
            steps.flat_map(read).collect::<BTreeMap<_, _>>().into_values().collect()
        }
        Work::Copy(c) => vec![if c.element == 4 { DType::F32 } else { DType::Bool }; 16],
        Work::Exchange(_) | Work::AllReduce(_) | Work::Join(_) | Work::Combine(_) | Work::Finish(_) => vec![],
    }
}

fn name(work: &Work) -> &'static str {
    match work {
        Work::Map(_) => "map",
        Work::Reduce(_) => "reduce",
        Work::Op(op) if op.epilogue.is_some() => "with an epilogue",
        Work::Op(op) => op.op.op().name(),
        Work::Copy(_) => "copy",
        Work::Band(_) => "band",
        Work::Exchange(_) | Work::AllReduce(_) | Work::Join(_) | Work::Combine(_) | Work::Finish(_) => {
            "between devices"
        }
    }
}

const STEP: StepContext = StepContext::new(5, 3);

/// Runs a piece of work on one instruction set; gives the bits of its results.
fn run(work: &Work, isa: Isa, pool: &Pool, inputs: &mut [Guarded], results: &[usize]) -> Vec<Vec<u8>> {
    let kernels: Vec<Kernel> = in_steps(work).iter().map(|work| Kernel::with_isa(work, isa)).collect();
    let mut outputs: Vec<Guarded> = results.iter().map(|bytes| Guarded::new(*bytes)).collect();
    let mut scratch = Guarded::new(kernels[0].scratch_bytes(pool.threads()));
    if isa == Isa::detect() {
        // The planner asks without preparing them.
        let backend = CpuBackend { threads: pool.threads() };
        let planned = in_steps(work).iter().map(|work| backend.scratch_bytes(work)).collect::<Vec<_>>();
        assert_eq!(planned, kernels.iter().map(|k| k.scratch_bytes(pool.threads())).collect::<Vec<_>>());
    }
    let from: Vec<*const u8> = inputs.iter_mut().map(|b| b.at().cast_const()).collect();
    let to: Vec<*mut u8> = outputs.iter_mut().map(Guarded::at).collect();
    let output_bytes = results.first().copied().unwrap_or(0);
    let operands = Operands { inputs: &from, outputs: &to, output_bytes, scratch: scratch.at() };
    let mut end = InProcess::mesh(1, 0, 0).remove(0);
    for kernel in kernels {
        // SAFETY: buffers are as large as the plan says, and the scratch as the kernel does.
        unsafe { kernel.run(pool, &mut end, &operands, STEP) }.unwrap();
    }
    let what = || format!("{isa:?}, {} threads: {work:?}", pool.threads());
    assert!(outputs.iter().all(Guarded::guarded), "wrote beside its result; {}", what());
    assert!(scratch.guarded(), "wrote beside its scratch; {}", what());
    assert!(inputs.iter().all(Guarded::guarded), "wrote beside its inputs; {}", what());
    outputs.iter().map(|b| b.data().to_vec()).collect()
}

/// A rim comes behind its interior.
fn in_steps(work: &Work) -> Vec<Work> {
    let interior = match work {
        Work::Op(op) => match &op.share {
            Share::Rim(r) => Some(OpWork { share: Share::Interior(r.clone()), ..OpWork::clone(op) }),
            Share::Whole | Share::Interior(_) => None,
        },
        _ => None,
    };
    interior.map(|op| Work::Op(Box::new(op))).into_iter().chain([work.clone()]).collect()
}

/// What an op with an epilogue gives if the op stores its result and a loop of its own reads it.
fn apart(op: &OpWork, pool: &Pool, inputs: &mut Vec<Guarded>, results: &[usize]) -> Option<Vec<Vec<u8>>> {
    let then = Work::from(op.epilogue.clone()?);
    let mut others = inputs.split_off(op.reads());
    let alone = Work::Op(Box::new(OpWork { epilogue: None, share: Share::Whole, ..op.clone() }));
    let bytes = op.output.region.elements() * op.output.ty.dtype.bytes();
    let product = run(&alone, Isa::detect(), pool, inputs, &[bytes]).remove(0);
    let mut given = Guarded::new(bytes);
    given.fill(&product);
    others.push(given);
    let bits = run(&then, Isa::detect(), pool, &mut others, results);
    others.pop();
    inputs.extend(others);
    Some(bits)
}

/// What a reduction gives that stores values besides, if it only reduces and a map stores.
fn sums_apart(r: &Reduction, pool: &Pool, inputs: &mut [Guarded], results: &[usize]) -> Option<Vec<Vec<u8>>> {
    let of = |slots: &[usize]| {
        let body = Body { results: slots.to_vec(), ..Body::clone(&r.nest.body) };
        Loop { body: body.into(), ..r.nest.clone() }
    };
    let (stored, summed) = r.nest.body.results.split_at(r.stored);
    let reduce = Work::Reduce(Box::new(Reduction { nest: of(summed), stored: 0, ..r.clone() }));
    let map = (!stored.is_empty()).then(|| Work::Map(of(stored)))?;
    let mut bits = run(&map, Isa::detect(), pool, inputs, &results[..r.stored]);
    bits.extend(run(&reduce, Isa::detect(), pool, inputs, &results[r.stored..]));
    Some(bits)
}

/// What an op gives whose first input is in pieces if that is put together first.
fn together(op: &OpWork, pool: &Pool, inputs: &mut Vec<Guarded>, results: &[usize]) -> Option<Vec<Vec<u8>>> {
    let element = op.inputs[0].ty.dtype.bytes();
    let mut whole = Guarded::new(op.inputs[0].region.elements() * element);
    for piece in &op.pieces {
        let copy = CopyPlan::new(&piece.into_whole(&op.inputs[0].region), element);
        // SAFETY: a piece lies in its input, and has its place in the whole.
        unsafe { copy.run(pool, inputs[piece.input].at().add(piece.first), whole.at()) };
    }
    let own = (!op.pieces.is_empty()).then(|| inputs.remove(op.inputs.len()))?;
    std::mem::swap(&mut inputs[0], &mut whole);
    let one = Work::Op(Box::new(OpWork { share: Share::Whole, pieces: vec![], ..op.clone() }));
    let bits = run(&one, Isa::detect(), pool, inputs, results);
    std::mem::swap(&mut inputs[0], &mut whole);
    inputs.insert(op.inputs.len(), own);
    Some(bits)
}

/// Runs all work that a program's plan has on a mesh; adds the kernels' names to `seen`.
fn hold(p: &Program, mesh: &str, layout: &str, seen: &mut BTreeSet<&'static str>) {
    let backend = CpuBackend { threads: 1 };
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let plan = plan_program(p, &mesh, &layout, &PlanOptions::default(), &backend).unwrap();
    let pools: Vec<Pool> = (1..=3).map(|n| Pool::new(n, None)).collect();
    for device in plan.functions.values().flatten() {
        for (s, step) in device.steps.iter().enumerate() {
            let types = dtypes(&step.work);
            let is_interior = matches!(&step.work, Work::Op(op) if matches!(op.share, Share::Interior(_)));
            if is_interior || types.is_empty() && !matches!(step.work, Work::Map(_)) {
                continue;
            }
            seen.insert(name(&step.work));
            let mut inputs: Vec<Guarded> = Vec::new();
            for (i, (b, t)) in step.inputs.iter().zip(&types).enumerate() {
                let mut buffer = Guarded::new(b.bytes);
                buffer.fill(&numbers(*t, b.bytes, (s * 16 + i) as u32));
                inputs.push(buffer);
            }
            let results: Vec<usize> = step.outputs.iter().map(|b| b.bytes).collect();
            // Matrix tiles have bits of their own.
            let tiled =
                matches!(name(&step.work), "contract" | "conv" | "conv_transpose" | "with an epilogue" | "band")
                    && types.contains(&DType::Bf16);
            let arithmetic = |isa: Isa| usize::from(tiled && isa == Isa::Amx);
            let mut first = [None, None];
            if let Work::Reduce(r) = &step.work {
                first[0] = sums_apart(r, &pools[0], &mut inputs, &results);
                seen.extend(first[0].as_ref().map(|_| "sums that store"));
            }
            if let Work::Op(op) = &step.work {
                let whole = Work::Op(Box::new(OpWork { share: Share::Whole, ..OpWork::clone(op) }));
                let bits = apart(op, &pools[0], &mut inputs, &results);
                let whole = || run(&whole, Isa::detect(), &pools[0], &mut inputs, &results);
                let bits = bits.unwrap_or_else(whole);
                let pieces = together(op, &pools[0], &mut inputs, &results);
                assert!(pieces.as_ref().is_none_or(|whole| *whole == bits), "other bits in pieces: {:?}", step.work);
                seen.extend(pieces.map(|_| "in pieces"));
                first[arithmetic(Isa::detect())] = Some(bits);
                seen.extend(matches!(op.share, Share::Rim(_)).then_some("rim"));
                seen.extend(matches!(op.epilogue, Some(Epilogue::Reduce(_))).then_some("an epilogue that sums"));
            }
            for isa in Isa::available() {
                for pool in &pools {
                    let bits = run(&step.work, isa, pool, &mut inputs, &results);
                    let same = *first[arithmetic(isa)].get_or_insert_with(|| bits.clone()) == bits;
                    assert!(same, "other bits; {isa:?}, {} threads: {:?}", pool.threads(), step.work);
                }
            }
        }
    }
}

fn volume() -> [Dim; 5] {
    [dim("batch", 2), dim("x", 9), dim("y", 10), dim("z", 11), dim("channel", 3)]
}

/// A network of products, norms, pools and everything else, trained.
fn network(dtype: DType) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("image", DType::F32, &volume()).cast(dtype);
        let labels = g.input("labels", DType::I32, &volume()[..4]);
        let space = ["x", "y", "z"];
        let block = |x: &Tensor, name: &str, filter: Filter, channels: usize| {
            let y = nn::conv(x, &format!("{name}.c"), &filter, &dim("channel", channels));
            let y = nn::batch_norm(&y, &format!("{name}.n"), "channel", &BatchNorm::default(), Mode::Train);
            nn::dropout(&nn::leaky_relu(&y, 0.1), 0.9, Mode::Train)
        };
        let fine = block(&x, "a", Filter::new(&space, 3), 40);
        let pooled =
            fine.max_pool(&[Window::same("x", 9, 2, 2, 1), Window::same("y", 10, 3, 2, 1), Window::valid("z", 2, 2)]);
        let coarse = block(&pooled, "b", Filter::new(&space, 3).stride(2), 70);
        let coarse = block(&coarse, "c", Filter::new(&["y"], 3).dilation(2).groups(2), 34);
        let up = Filter::new(&space, 3).stride(3).to(&[9, 9, 7]);
        let up = nn::gelu(&nn::conv_transpose(&coarse, "up", &up, &dim("channel", 17)));
        let joined = Tensor::concat(&[&fine, &up.pad("y", 0, 1, 0.0).pad("z", 2, 2, 0.5)], "channel");
        let logits = nn::dense(&joined, "head", &["channel"], &[dim("class", 5)], &Dense::default());
        let logits = logits.cast(DType::F32);
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        Optimizer::lamb(0.01, 0.1).clipped(1.0).apply(g, &loss);
        g.output("loss", &loss);
        g.output("accuracy", &nn::accuracy(&logits, &labels, "class"));
    })
    .unwrap();
    p.finish().unwrap()
}

#[test]
fn the_work_of_a_network_is_the_same_bits_on_every_instruction_set_and_thread() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        network_holds(dtype);
    }
}

fn network_holds(dtype: DType) {
    let mut seen = BTreeSet::new();
    hold(&network(dtype), "1", "", &mut seen);
    for (mesh, layout) in [("m=2,n=2", "x:m,y:n"), ("m=3,n=2", "z:m,batch:n"), ("m=2", "y:m")] {
        hold(&network(dtype), mesh, layout, &mut seen);
    }
    let all = [
        "contract",
        "conv",
        "conv_transpose",
        "conv_weight_grad",
        "copy",
        "map",
        "max_pool",
        "max_pool_grad",
        "reduce",
        "sums that store",
        "an epilogue that sums",
        "rim",
        "in pieces",
    ];
    for kernel in all {
        assert!(seen.contains(kernel), "{kernel}: not in {seen:?}");
    }
}

/// Products whose results go on through loops: activations, residual sums, drop-out, fewer bits, with the product kept or
/// not, and with results whose rows and columns lie in many ways.
fn products(dtype: DType, size: usize) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("x", DType::F32, &[dim("batch", 3), dim("seq", 37), dim("model", 70)]).cast(dtype);
        let of = |name: &str, dims: &[Dim]| g.variable(name, dims, nn::init::he_normal(8)).cast(dtype);
        let heads = [dim("head", 3), dim("size", size)];
        let q = x.contract(&of("q", &[&[dim("model", 70)][..], &heads].concat()), &["model"]);
        let q = nn::gelu(&q.add(&of("bias", &heads)));
        let other = of("kv", &[dim("seq_kv", 21), heads[0].clone(), heads[1].clone()]);
        let scores = q.contract(&other, &["size"]).mul_scalar(0.3).tanh();
        let back = scores.contract(&other, &["seq_kv"]);
        let out = back.contract(&of("o", &[heads[0].clone(), heads[1].clone(), dim("model", 70)]), &["head", "size"]);
        let out = nn::dropout(&out, 0.9, Mode::Train).add(&x);
        let wide = out.contract(&of("up", &[dim("model", 70), dim("wide", 600)]), &["model"]).relu();
        let loss = wide.cast(DType::F32).square().mean_all();
        Optimizer::adam(0.1).apply(g, &loss);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

#[test]
fn an_epilogue_gives_the_bits_of_its_product_and_its_loop() {
    for (dtype, size) in [(DType::F32, 33), (DType::Bf16, 33), (DType::F16, 33), (DType::F32, 32), (DType::Bf16, 16)] {
        let mut seen = BTreeSet::new();
        hold(&products(dtype, size), "1", "", &mut seen);
        assert!(seen.contains("with an epilogue"));
        for (mesh, layout) in [("m=2", "model:m"), ("m=2,n=3", "batch:m,head:n"), ("m=3", "seq:m")] {
            hold(&products(dtype, size), mesh, layout, &mut seen);
        }
    }
}

/// Rows that tasks have in several parts, which end within chunks, and rows of more channels than a block has points.
#[test]
fn an_epilogue_sums_up_what_tasks_have_in_parts() {
    for (dtype, [y, z, first, then]) in [
        (DType::F32, [4, 83, 160, 9]),
        (DType::Bf16, [4, 400, 160, 9]),
        (DType::F32, [11, 5, 3, 530]),
        (DType::F16, [1, 7, 3, 70]),
    ] {
        let dims = [dim("batch", 2), dim("x", 2), dim("y", y), dim("z", z), dim("channel", first)];
        let mut p = ProgramBuilder::new();
        p.function("train", |g| {
            let space = ["x", "y", "z"];
            let x = g.input("image", DType::F32, &dims).cast(dtype);
            let filter = Filter::new(&space, 3);
            let y = nn::conv(&x, "a", &filter, &dim("channel", then));
            let y = nn::instance_norm(&y, "a", "channel", &space, 1e-5).relu();
            let y = nn::conv(&y, "b", &Filter::new(&space, 1), &dim("channel", 5));
            g.output("loss", &y.cast(DType::F32).square().mean_all());
            Optimizer::adam(0.1).apply(g, &y.cast(DType::F32).square().mean_all());
        })
        .unwrap();
        let mut seen = BTreeSet::new();
        hold(&p.finish().unwrap(), "1", "", &mut seen);
        assert!(seen.contains("an epilogue that sums"));
    }
}

#[test]
fn bands_are_the_same_bits_on_every_instruction_set_and_thread() {
    for (dtype, seq) in [(DType::F32, 83), (DType::Bf16, 83), (DType::F32, 300), (DType::Bf16, 300)] {
        let mut p = ProgramBuilder::new();
        p.function("train", |g| {
            let x = g.input("x", DType::F32, &[dim("batch", 2), dim("seq", seq), dim("model", 30)]).cast(dtype);
            let mask = nn::attention_mask(&g.input("lengths", DType::I32, &[dim("batch", 2)]), &dim("seq", seq));
            let (heads, head) = (dim("heads", 3), dim("head", 21));
            let options = Attention { heads, head, init: nn::init::he_normal(8), keep: 0.8 };
            let y = nn::attention(&x, &x, &mask, "a", ["seq", "model"], &options, Mode::Train);
            let loss = y.cast(DType::F32).square().mean_all();
            Optimizer::adam(0.1).apply(g, &loss);
            g.output("loss", &loss);
        })
        .unwrap();
        let mut seen = BTreeSet::new();
        hold(&p.finish().unwrap(), "1", "", &mut seen);
        assert!(seen.contains("band"));
    }
}

#[test]
fn every_function_of_a_value_is_the_same_bits_on_every_instruction_set_and_thread() {
    let d = [dim("a", 37), dim("b", 53)];
    let mut p = ProgramBuilder::new();
    p.function("f", |g: &Graph| {
        let (x, y) = (g.input("x", DType::F32, &d), g.input("y", DType::F32, &d[1..]));
        let (i, j) = (g.input("i", DType::I32, &d), g.input("j", DType::I32, &d[..1]));
        let mut outputs: Vec<Tensor> = vec![];
        outputs.extend(UnaryFn::ALL.iter().filter(|f| **f != UnaryFn::Not).map(|f| x.apply(Unary { f: *f })));
        for f in BinaryFn::ALL {
            let of = |a: &Tensor, b: &Tensor| g.apply(Binary { f }, &[a, b]);
            match f {
                BinaryFn::And | BinaryFn::Or => outputs.push(of(&x.greater(&y), &i.equal(&j))),
                BinaryFn::Pow => outputs.push(of(&x.abs(), &y)),
                _ => outputs.push(of(&x, &y)),
            }
            if !matches!(f, BinaryFn::And | BinaryFn::Or | BinaryFn::Pow | BinaryFn::Div | BinaryFn::Rem) {
                outputs.push(of(&i, &j));
            }
        }
        for f in
            [Distribution::Uniform, Distribution::Normal, Distribution::TruncatedNormal, Distribution::Bernoulli(0.4)]
        {
            outputs.push(g.random(f, &d));
        }
        outputs.push(x.cast(DType::I32));
        outputs.push(i.cast(DType::F32));
        for dtype in [DType::Bf16, DType::F16] {
            outputs.push(x.cast(dtype).exp().cast(DType::F32));
            outputs.push(i.cast(dtype).add(&x.cast(dtype)).cast(DType::F32));
        }
        outputs.push(x.cast(DType::F16).cast(DType::Bf16).cast(DType::F16).cast(DType::F32));
        for over in [vec!["a"], vec!["b"], vec!["a", "b"]] {
            outputs.extend([
                x.sum(&over),
                x.max(&over),
                x.min(&over),
                i.sum(&over),
                i.max(&over),
                x.square().sum(&over),
            ]);
            outputs.push(x.less(&y).any(&over));
        }
        outputs.push(x.reorder(&["b", "a"]));
        outputs.push(x.shift("b", 5, true).slice_by("a", 1, 30, 3));
        outputs.iter().enumerate().for_each(|(i, t)| g.output(format!("y{i}"), t));
    })
    .unwrap();
    let p = p.finish().unwrap();
    let mut seen = BTreeSet::new();
    for (mesh, layout) in [("1", ""), ("m=3", "a:m"), ("m=2,n=3", "a:m,b:n")] {
        hold(&p, mesh, layout, &mut seen);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["copy", "map", "reduce"]);
}

#[test]
fn products_of_16_bit_floats_are_the_same_bits_on_every_instruction_set_and_thread() {
    [DType::Bf16, DType::F16].into_iter().for_each(products_hold);
}

fn products_hold(dtype: DType) {
    // Sides in either order, leaves of even and odd length, pieces of several leaves and leaves of several pieces.
    for (m, k, n, grain) in [(37, 75, 70, 1), (20, 64, 33, 32), (17, 2602, 5, 1301), (3, 1200, 40, 7), (1, 9, 1, 3)] {
        let of = |names: [&str; 3]| {
            names.map(|d| dim(d, [("m", m), ("k", k), ("n", n), ("batch", 2)].iter().find(|s| s.0 == d).unwrap().1))
        };
        let mut p = ProgramBuilder::new();
        p.function("f", |g: &Graph| {
            g.grain("k", grain);
            let sides = [(["batch", "m", "k"], ["batch", "k", "n"]), (["k", "batch", "m"], ["n", "k", "batch"])];
            for (i, (a, b)) in sides.iter().enumerate() {
                let half = |name: String, dims: [&str; 3]| g.input(name, DType::F32, &of(dims)).cast(dtype);
                let (a, b) = (half(format!("a{i}"), *a), half(format!("b{i}"), *b));
                g.output(format!("y{i}"), &a.contract_wide(&b, &["k"]));
                g.output(format!("z{i}"), &a.contract_wide(&b, &["k", "batch"]));
            }
        })
        .unwrap();
        let mut seen = BTreeSet::new();
        let p = p.finish().unwrap();
        hold(&p, "1", "", &mut seen);
        hold(&p, "m=2", "k:m", &mut seen);
        assert!(seen.contains("contract"));
    }
}

#[test]
fn convolutions_of_16_bit_floats_are_the_same_bits_on_every_instruction_set_and_thread() {
    [DType::Bf16, DType::F16].into_iter().for_each(convolutions_hold);
}

fn convolutions_hold(dtype: DType) {
    // Channels and voxels in leaves of even and odd length; a leaf of voxels that is summed in several pieces.
    for (sizes, channels, grains, layout) in [
        ([5, 6, 21], [13, 35], [5, 3], "i:m"),
        ([4, 4, 9], [1, 16], [1, 1], "z:m"),
        ([7, 48, 31], [64, 8], [64, 48], "batch:m"),
    ] {
        let space: Vec<Dim> = ["x", "y", "z"].iter().zip(sizes).map(|(d, n)| dim(*d, n)).collect();
        let mut p = ProgramBuilder::new();
        p.function("f", |g: &Graph| {
            ["i", "o"].iter().for_each(|d| g.grain(*d, grains[0]));
            ["x", "y", "z"].iter().for_each(|d| g.grain(*d, grains[1]));
            let windows = [
                [Window::same("x", sizes[0], 3, 1, 1), Window::same("y", sizes[1], 3, 1, 1)],
                [Window::same("x", sizes[0], 2, 2, 1), Window::padded("y", 2, 1, 0, 1).dilated(2)],
            ];
            for (n, [x, y]) in windows.into_iter().enumerate() {
                let z = Window::same("z", sizes[2], 3, 1 + n, 1);
                let windows = vec![x, y, z];
                let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
                let half = |name: String, dims: &[Dim]| g.input(name, DType::F32, dims).cast(dtype);
                let kernel: Vec<Dim> = conv.windows.iter().map(|w| dim(w.kernel(), w.size)).collect();
                let of = |dims: &[Dim], more: &[(&str, usize)]| {
                    dims.iter().cloned().chain(more.iter().map(|(d, n)| dim(*d, *n))).collect::<Vec<_>>()
                };
                let x = half(format!("x{n}"), &of(&[&[dim("batch", 2)], &space[..]].concat(), &[("i", channels[0])]));
                let w = half(format!("w{n}"), &of(&kernel, &[("i", channels[0]), ("o", channels[1])]));
                let y = x.conv(&w, &conv);
                let seed = y.cast(DType::F32).square().sum_all();
                g.output(format!("y{n}"), &y);
                for (i, grad) in g.gradients(&seed, &[&x, &w]).iter().enumerate() {
                    g.output(format!("d{n}{i}"), grad);
                }
            }
        })
        .unwrap();
        let mut seen = BTreeSet::new();
        let p = p.finish().unwrap();
        hold(&p, "1", "", &mut seen);
        hold(&p, "m=2", layout, &mut seen);
        assert!(["conv_weight_grad", "with an epilogue"].iter().all(|k| seen.contains(k)), "{seen:?}");
    }
}

/// Holds the ops of a program on one device to their reference, on every instruction set, and gives which there were.
/// Values are whole numbers, of which no sum is rounded.
fn are_as_defined(p: &Program) -> BTreeSet<&'static str> {
    let backend = CpuBackend { threads: 1 };
    let whole = ("1".parse().unwrap(), "".parse().unwrap());
    let plan = plan_program(p, &whole.0, &whole.1, &PlanOptions::default(), &backend).unwrap();
    let mut seen = BTreeSet::new();
    for step in plan.functions.values().flatten().flat_map(|device| &device.steps) {
        let Work::Op(op) = &step.work else { continue };
        seen.insert(name(&step.work));
        // What is summed of 16-bit floats is not rounded to them here.
        let op = OpWork { epilogue: None, ..OpWork::clone(op) };
        let work = Work::Op(Box::new(op.clone()));
        let draw = |stream: &Stream, i: usize| (stream.uniform(i as u64) * 9.0).floor() - 4.0;
        let values = |(key, part): (usize, &Part)| -> Vec<f32> {
            let stream = Stream { seed: 3, step: 0, key: key as u32 };
            (0..part.region.elements()).map(|i| draw(&stream, i)).collect()
        };
        let values: Vec<Vec<f32>> = op.inputs.iter().enumerate().map(values).collect();
        let wide = |(part, v): (&Part, &Vec<f32>)| {
            let v = v.iter().map(|v| f64::from(*v)).collect();
            Reference::from_shape_vec(part.ty.shape(), v).unwrap()
        };
        let wide: Vec<Reference> = op.inputs.iter().zip(&values).map(wide).collect();
        let types: Vec<_> = op.inputs.iter().map(|part| &*part.ty).collect();
        let defined = op.op.op().reference(&wide.iter().collect::<Vec<_>>(), &types, &op.output.ty);
        let defined: Vec<u8> = defined.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect();
        let buffer = |(part, v): (&Part, &Vec<f32>)| {
            let bytes: Vec<u8> = match part.ty.dtype {
                DType::Bf16 => v.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
                DType::F16 => v.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
                _ => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            let mut buffer = Guarded::new(bytes.len());
            buffer.fill(&bytes);
            buffer
        };
        let mut inputs: Vec<Guarded> = op.inputs.iter().zip(&values).map(buffer).collect();
        for isa in Isa::available() {
            let found = run(&work, isa, &Pool::new(2, None), &mut inputs, &[defined.len()]);
            assert!(found[0] == defined, "{isa:?}: {:?}", op.op);
        }
    }
    seen
}

/// A convolution of inputs of these sizes, of batch and space, and so many channels, in leaves of some; and the gradient by them.
fn both_ways(conv: &Conv, sizes: [usize; 4], channels: [usize; 2], grain: usize, dtype: DType) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g: &Graph| {
        ["i", "o"].iter().for_each(|d| g.grain(*d, grain));
        let space = ["batch", "x", "y", "z"].into_iter().zip(sizes).map(|(d, n)| dim(d, n));
        let dims: Vec<Dim> = space.chain([dim("i", channels[0])]).collect();
        let kernel = conv.windows.iter().map(|w| dim(w.kernel(), w.size));
        let kernel: Vec<Dim> = kernel.chain([dim("i", channels[0]), dim("o", channels[1])]).collect();
        let (x, w) = (g.input("x", dtype, &dims), g.input("w", dtype, &kernel));
        let y = x.conv(&w, conv);
        let dy = g.input("dy", dtype, &y.ty().dims);
        g.output("dx", &g.gradients(&y.mul(&dy).sum_all(), &[&x])[0]);
        g.output("y", &y);
    })
    .unwrap();
    p.finish().unwrap()
}

/// Windows that outputs along the first dimension share, one after the other, or cannot: strides, gaps, padding.
#[test]
fn convolutions_of_many_outputs_are_as_they_are_defined() {
    for (size, stride, dilation, lo) in
        [(3, 1, 1, 1), (2, 1, 1, 0), (3, 2, 1, 1), (2, 1, 3, 2), (3, 1, 2, 2), (2, 2, 3, 1), (5, 2, 1, 2), (2, 3, 1, 0)]
    {
        let window = Window::padded("x", size, stride, lo, lo).dilated(dilation);
        let windows = vec![window, Window::same("y", 4, 3, 1, 1), Window::same("z", 5, 2, 1, 1)];
        let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
        let seen = are_as_defined(&both_ways(&conv, [24, 13, 4, 5], [2, 3], 1, DType::F32));
        assert!(["conv", "conv_transpose"].iter().all(|k| seen.contains(k)), "{seen:?}");
    }
}

/// Windows of three by three along the last two dimensions, of one tap, two and three along the first one: patches that are cut,
/// rows of more than a task's, and channels in leaves.
#[test]
fn filtered_windows_are_as_they_are_defined() {
    for (first, lo, sizes, channels, grain) in [
        (3, [1, 1], [2, 5, 9, 12], [8, 16], 64),
        (1, [0, 2], [1, 3, 11, 8], [33, 70], 8),
        (2, [2, 0], [1, 2, 8, 300], [64, 9], 32),
        (3, [1, 1], [1, 4, 8, 9], [40, 33], 5),
    ] {
        let last = [("y", lo[0]), ("z", lo[1])].map(|(d, lo)| Window::padded(d, 3, 1, lo, 1));
        let windows = [Window::same("x", sizes[1], first, 1, 1)].into_iter().chain(last).collect();
        let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
        for dtype in [DType::F32, DType::F16] {
            let p = both_ways(&conv, sizes, channels, grain, dtype);
            let f = p.function("f").unwrap();
            let filtered = f.nodes.iter().filter(|n| n.op.op().kernel_share(&f.input_types(n), &n.ty, None) < 1.0);
            assert_eq!(filtered.count(), 2, "y and dx");
            are_as_defined(&p);
        }
    }
}

/// Sums of single products, of a few with few channels and many, of one batch and several, of more than lie in a cache at a
/// time, and what does not fit into the workspace.
#[test]
fn weight_gradients_are_as_they_are_defined() {
    let cases: [([usize; 4], usize, usize, usize, [usize; 2]); 10] = [
        ([2, 3, 17, 19], 2, 3, 1, [20, 33]),
        ([2, 1, 9, 34], 2, 3, 1, [8, 16]),
        ([1, 5, 20, 22], 1, 3, 1, [24, 17]),
        ([1, 9, 10, 11], 1, 3, 1, [7, 18]),
        ([2, 24, 5, 21], 2, 3, 1, [16, 16]),
        ([3, 8, 8, 8], 8, 3, 1, [5, 17]),
        ([1, 16, 12, 9], 8, 3, 1, [13, 33]),
        ([1, 17, 9, 13], 8, 3, 2, [6, 50]),
        ([2, 5, 6, 7], 8, 2, 2, [3, 20]),
        ([1, 1, 12, 12], 4, 9, 1, [4500, 2]),
    ];
    let short =
        [([1, 8, 6, 8], 8, 3, 1, [31, 48]), ([1, 12, 9, 9], 6, 3, 1, [33, 34]), ([6, 5, 3, 6], 3, 2, 2, [36, 30])];
    let dtypes = [DType::F32, DType::Bf16, DType::F16];
    let all = cases.map(|c| (c, DType::F32)).into_iter().chain(short.into_iter().flat_map(|c| dtypes.map(|d| (c, d))));
    for ((space, chunks, size, stride, channels), dtype) in all {
        let window = |(d, n): (&str, usize)| Window::same(d, n, if n > 1 { size } else { 1 }, stride.min(n), 1);
        let [batch, x, y, z] = space;
        let windows: Vec<Window> = [("x", x), ("y", y), ("z", z)].map(window).into();
        let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
        let mut p = ProgramBuilder::new();
        p.function("f", |g: &Graph| {
            let dims = [dim("batch", batch), dim("x", x), dim("y", y), dim("z", z), dim("i", channels[0])];
            let kernel = conv.windows.iter().map(|w| dim(w.kernel(), w.size));
            let kernel: Vec<Dim> = kernel.chain([dim("i", channels[0]), dim("o", channels[1])]).collect();
            let (x, w) = (g.input("x", dtype, &dims), g.input("w", dtype, &kernel));
            let y = x.conv(&w, &conv);
            let dy = g.input("dy", dtype, &y.ty().dims);
            g.output("dw", &g.gradients(&y.mul(&dy).sum_all(), &[&w])[0]);
        })
        .unwrap();
        let seen = are_as_defined(&p.finish().unwrap().in_chunks(chunks));
        assert!(seen.contains("conv_weight_grad"), "{seen:?}");
    }
}

#[test]
fn indexing_and_resampling_are_the_same_bits_on_every_instruction_set_and_thread() {
    let d = [dim("a", 6), dim("b", 9), dim("c", 37)];
    let mut p = ProgramBuilder::new();
    p.function("f", |g: &Graph| {
        let x = g.input("x", DType::F32, &d);
        let (i, j) = (g.input("i", DType::I32, &d[..2]), g.input("j", DType::I32, &[dim("n", 50)]));
        let table = x.sum(&["b"]);
        let window = [Window::padded("b", 3, 2, 1, 1), Window::same("c", 37, 4, 3, 1)];
        let outputs = [
            table.gather(&j, "a"),
            x.gather(&i.rename("b", "k"), "c"),
            g.iota(&dim("v", 5)).gather(&j, "v"),
            x.scatter_add(&i, &dim("row", 7)),
            x.scatter_add_over(&i, &dim("row", 4), &["b"]),
            x.reorder(&["c", "b", "a"]).scatter_add_over(&i, &dim("row", 4), &[]),
            i.scatter_add(&i, &dim("row", 3)),
            x.top_k("c", &dim("k", 5)).1,
            i.top_k("a", &dim("k", 6)).0,
            x.avg_pool(&window),
            x.resize(&[("b", 14), ("c", 20)], Resize::Linear),
            x.resize(&[("a", 4), ("c", 50)], Resize::Nearest),
            x.less(&g.scalar(0.1)).resize(&[("b", 5)], Resize::Nearest),
        ];
        for (n, y) in outputs.iter().enumerate() {
            g.output(format!("y{n}"), y);
            if y.ty().dtype == DType::F32 {
                let grad = g.gradients(&y.square().sum_all(), &[&x]).remove(0);
                g.output(format!("d{n}"), &grad);
            }
        }
    })
    .unwrap();
    let p = p.finish().unwrap();
    let mut seen = BTreeSet::new();
    for (mesh, layout) in [("1", ""), ("m=3", "a:m"), ("m=2,n=3", "b:m,c:n"), ("m=3,n=2", "a:m,row:n")] {
        hold(&p, mesh, layout, &mut seen);
    }
    let all = ["gather", "resize", "resize_grad", "scatter_add", "top_k", "window_sum", "window_sum_grad"];
    for kernel in all {
        assert!(seen.contains(kernel), "{kernel}: not in {seen:?}");
    }
}

/// The names of all functions of an ELF file of 64 bits, by its table of symbols; none if it is stripped.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn functions(file: &[u8]) -> Vec<String> {
    let number =
        |at: usize, bytes: usize| file[at..at + bytes].iter().rev().fold(0usize, |n, b| n << 8 | usize::from(*b));
    let section = |i: usize| number(0x28, 8) + i * number(0x3a, 2);
    let (table, function) = (2, 2);
    let tables = (0..number(0x3c, 2)).map(section).filter(|s| number(s + 4, 4) == table);
    let names = tables.flat_map(|s| {
        let (first, bytes) = (number(s + 0x18, 8), number(s + 0x20, 8));
        let strings = number(section(number(s + 0x28, 4)) + 0x18, 8);
        let of = (first..first + bytes).step_by(24).filter(|at| number(at + 4, 1) & 15 == function);
        of.map(move |at| {
            let name = &file[strings + number(at, 4)..];
            String::from_utf8_lossy(&name[..name.iter().position(|b| *b == 0).unwrap_or(0)]).into_owned()
        })
    });
    names.collect()
}

/// Where a function is compiled for fewer instructions than what it calls (closures in closures are), an instruction becomes a
/// function whose operands go through memory: a kernel is 15 times slower then, and its bits are the same.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn no_kernel_calls_a_vector_instruction_as_a_function() {
    let all = functions(&std::fs::read(std::env::current_exe().unwrap()).unwrap());
    assert!(all.iter().any(|f| f.contains("tile_avx512")), "no kernel among {} functions", all.len());
    let is_instruction = |f: &&String| f.contains("_mm512_") || f.contains("_mm256_fmadd");
    assert_eq!(all.iter().filter(is_instruction).collect::<Vec<_>>(), Vec::<&String>::new());
}
