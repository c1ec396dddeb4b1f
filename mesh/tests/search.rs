//! The layouts that a search finds.

#[path = "common/models.rs"]
mod models;

use mesh::dim::{DType, Name, dim};
use mesh::error::Error;
use mesh::graph::Node;
use mesh::layout::{Layout, Mesh};
use mesh::machine::Machine;
use mesh::nn::{self, Dense};
use mesh::optim::Optimizer;
use mesh::placement::{Placement, Subject};
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};
use mesh::search::meshes::meshes;
use mesh::search::{Devices, Found, Search};
use models::{Bert, LARGE, bert, unet};
use std::collections::BTreeMap;

/// A backend without scratch.
struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

/// Plans of devices that wait in every collective: of such, prices are exact.
fn plan(program: &Program, mesh: &Mesh, layout: &Layout) -> Result<Vec<ProgramPlan>, Error> {
    let options = PlanOptions { waiting: true, ..PlanOptions::default() };
    Ok(vec![plan_program(program, mesh, layout, &options, &Plain)?])
}

/// Plans as they run, with what is sent beside other steps.
fn plan_to_run(program: &Program, mesh: &Mesh, layout: &Layout) -> Result<Vec<ProgramPlan>, Error> {
    Ok(vec![plan_program(program, mesh, layout, &PlanOptions::default(), &Plain)?])
}

fn h100() -> Machine {
    Machine::named("h100").unwrap().0
}

fn search<'a>(
    machine: &'a Machine,
    devices: Devices,
    memory: usize,
    build: &'a dyn Fn(&[Name]) -> Result<Program, Error>,
) -> Search<'a> {
    Search {
        machine,
        devices,
        memory,
        chunks: vec![],
        may_recompute: true,
        function: "train",
        threads: 1,
        waiting: true,
        build,
        plan: &plan,
    }
}

/// The search by plans as they run: which of two layouts is faster is for those to say.
fn to_run(search: Search) -> Search {
    Search { waiting: false, plan: &plan_to_run, ..search }
}

/// Whether what the prices say of time is what the plan says.
fn assert_priced(found: &Found, within: f64) {
    let planned = found.planned.unwrap();
    let off = found.priced.seconds / planned.seconds - 1.0;
    assert!(off.abs() < within, "{:?} by the prices, {planned:?} by the plan", found.priced);
}

/// Whether what the prices say of memory is what the plan says: 20 % above it to 10 % below, or of stages to 15 % below.
fn assert_remembered(found: &Found) {
    let planned = found.planned.unwrap();
    let share = found.priced.bytes as f64 / planned.bytes as f64;
    let least = if found.mesh.axis("pipe").is_some() { 0.85 } else { 0.9 };
    assert!((least..1.2).contains(&share), "{:?} by the prices, {planned:?} by the plan", found.priced);
}

/// Of some dimensions, as many indices as the device with the most has of them, in the result of the first node of `train` in a scope
/// that has them all.
fn extents<const N: usize>(found: &Found, program: &Program, scope: &str, dims: [&str; N]) -> [usize; N] {
    let f = program.function("train").unwrap();
    let is_it = |n: &&Node| n.scope.starts_with(scope) && dims.iter().all(|d| n.ty.has(d));
    let node = f.nodes.iter().find(is_it).unwrap();
    let placement = Placement::new(&found.mesh, &found.layout, program);
    let regions = placement.regions(&node.ty, &placement.spec(&Subject::node(f, node)).unwrap());
    dims.map(|d| regions.iter().map(|r| r.get(&Name::from(d)).unwrap().len()).max().unwrap())
}

#[test]
fn a_unet_is_split_in_space_and_its_prices_are_its_plans() {
    let (machine, build) = (h100(), |r: &[Name]| Ok(unet(256, 32, 4, r)));
    let found = search(&machine, Devices::Count(8), machine.memory, &build).find().unwrap();
    assert!(["x", "y", "z"].iter().any(|axis| found.mesh.axis(axis).is_some()), "{}", found.mesh);
    assert!(found.planned.unwrap().bytes <= machine.memory && found.bound <= found.priced.seconds);
    assert_priced(&found, 0.02);
    assert_remembered(&found);
    assert_eq!(found.layout.to_string().parse::<Layout>().unwrap(), found.layout);
}

/// 512³ voxels that come down to 16³: there the weights are larger than what they are applied to.
#[test]
fn the_deep_levels_of_a_unet_are_split_otherwise_than_the_shallow_ones() {
    let (machine, build) = (h100(), |r: &[Name]| Ok(unet(512, 32, 6, r)));
    let program = build(&[]).unwrap();
    for (devices, space) in [(8, "x=2,y=2,z=2"), (64, "x=4,y=4,z=4")] {
        let search = search(&machine, Devices::Count(devices), machine.memory, &build);
        let found = search.find().unwrap();
        let voxels = |level: u32| {
            let own = extents(&found, &program, &format!("encoder.{level}"), ["x", "y", "z", "channel"]);
            (own[..3].iter().product::<usize>() * devices) >> (3 * (9 - level))
        };
        assert_eq!([0, 1, 2].map(voxels), [1; 3], "{}", found.layout);
        assert!(voxels(5) > 1, "{}", found.layout);
        assert_priced(&found, 0.05);
        assert_remembered(&found);
        // It is faster than space everywhere.
        let search = to_run(search);
        let everywhere =
            search.takes(found.chunks, &[], &space.parse().unwrap(), &"x:x,y:y,z:z".parse().unwrap()).unwrap();
        let found = search.takes(found.chunks, &found.recompute, &found.mesh, &found.layout).unwrap();
        assert!(found.seconds < everywhere.seconds, "{found:?}, {everywhere:?}");
    }
}

#[test]
fn where_memory_is_short_something_is_made_again_or_split_and_it_fits() {
    let (machine, small) = (h100(), Bert { layers: 2, width: 256, heads: 4, batch: 512, ..LARGE });
    let build = |r: &[Name]| Ok(bert(small, r));
    let of = |memory| search(&machine, Devices::Mesh("data=4".parse().unwrap()), memory, &build).find();
    let free = of(machine.memory).unwrap();
    let budget = free.planned.unwrap().bytes * 9 / 10;
    let less = of(budget).unwrap();
    assert!(less.planned.unwrap().bytes <= budget, "{less:?}");
    assert!(less.priced.seconds >= free.priced.seconds && less.bound <= less.priced.seconds);
    assert_eq!(of(1000).unwrap_err().cause.code(), "M0001");
}

/// A small BERT of the large one's width.
fn few_layers(layers: usize) -> Bert {
    Bert { layers, ..LARGE }
}

#[test]
fn layers_share_examples_out_to_as_many_devices_as_they_have_chunks() {
    let machine = h100();
    let build = |r: &[Name]| Ok(bert(few_layers(2), r));
    let search = |chunks: &[usize]| {
        let search = to_run(search(&machine, Devices::Count(64), machine.memory, &build));
        Search { chunks: chunks.to_vec(), ..search }
    };
    // Where both are tried, it is the one that is faster.
    let (few, many) = (search(&[8]).find().unwrap(), search(&[8, 64]).find().unwrap());
    assert_eq!((few.chunks, many.chunks), (8, 64));
    assert!(many.planned.unwrap().seconds < few.planned.unwrap().seconds, "{many:?} {few:?}");
    assert_remembered(&many);
    let program = build(&[]).unwrap().in_chunks(64);
    let wide = extents(&many, &program, "encoder/layer.0", ["batch", "seq", "d_ff"]);
    assert_eq!(wide, [LARGE.batch / 64, LARGE.seq, 4 * LARGE.width]);
    // Each device has its part of what the optimizer keeps of a layer, as far as dimensions have so many chunks.
    let placement = Placement::new(&many.mesh, &many.layout, &program);
    let slots = program.variables.iter().filter(|v| v.name.contains("/layer.") && v.name.ends_with("kernel/adam.m"));
    for v in slots.filter(|v| v.ty.has("d_ff")) {
        let regions = placement.regions(&v.ty, &placement.spec(&Subject::variable(v)).unwrap());
        assert!(regions.iter().all(|r| 64 * r.elements() == v.ty.elements()), "{} by {}", v.name, many.layout);
    }
    // That is faster than all of it, and than what splits all layers in the same way.
    let search = search(&[]);
    for zero in ["", ",slots{*:data},gradients{*:data},variables{*:data}"] {
        let layout = format!("batch:data{zero}").parse().unwrap();
        let usual = search.takes(64, &[], &"data=64".parse().unwrap(), &layout).unwrap();
        assert!(many.planned.unwrap().seconds <= usual.seconds, "{many:?}, {usual:?} by {layout}");
    }
}

#[test]
fn the_stages_of_a_pipeline_have_the_layers_in_order() {
    let (machine, small) = (h100(), Bert { batch: 64, micro: 4, ..few_layers(6) });
    let build = |r: &[Name]| Ok(bert(small, r));
    let of = |devices| search(&machine, devices, machine.memory, &build).find().unwrap();
    let found = of(Devices::Mesh("pipe=2,a=2".parse().unwrap()));
    assert_remembered(&found);
    let layout = found.layout.to_string();
    assert!(layout.contains("@pipe:1"), "{layout}");
    // Layers from the first one on are at the first stage, and no others.
    let first: Vec<bool> = (0..6).map(|i| layout.contains(&format!("encoder/layer.{i}/**{{@pipe:0}}"))).collect();
    assert!(first[0] && !first[5] && first.is_sorted_by(|a, b| a >= b), "{layout}");
    // Each stage has the variables of its own layers, and no others.
    let program = bert(small, &[]);
    let placement = Placement::new(&found.mesh, &found.layout, &program);
    for v in program.variables.iter().filter(|v| v.name.starts_with("encoder/layer.")) {
        let regions = placement.regions(&v.ty, &placement.spec(&Subject::variable(v)).unwrap());
        let layer: usize = v.name["encoder/layer.".len()..].split('/').next().unwrap().parse().unwrap();
        let stage = usize::from(!first[layer]);
        let axis = found.mesh.axis("pipe").unwrap();
        assert!((0..4).all(|d| regions[d].is_empty() != (found.mesh.coordinates(d)[axis] == stage)), "{}", v.name);
    }
    // It is among what is looked at where the mesh is free.
    assert!(of(Devices::Count(4)).meshes > of(Devices::Mesh("a=2,b=2".parse().unwrap())).meshes);
}

/// Eight of the 44 layers of a transformer of 20 billion parameters, and so many devices for each of them.
#[test]
fn wide_layers_are_shared_out_by_tensors_data_and_stages() {
    let (machine, wide) = (h100(), Bert { layers: 8, width: 6144, heads: 48, batch: 256, micro: 8, ..LARGE });
    let build = |r: &[Name]| Ok(bert(wide, r));
    let found = search(&machine, Devices::Count(16), machine.memory, &build).find().unwrap();
    assert!(found.mesh.axis("pipe").is_some(), "{}", found.mesh);
    let own = extents(&found, &build(&[]).unwrap(), "encoder/layer.0", ["batch", "d_ff"]);
    assert!(own[0] < wide.batch / wide.micro && own[1] < 4 * wide.width, "{}", found.layout);
    assert!(found.planned.unwrap().bytes <= machine.memory);
    assert_remembered(&found);
}

/// Scores of each row by every other one. Rows are needed whole, and to gather them is cheaper than to make them everywhere.
#[test]
fn what_a_layout_that_is_found_gathers_it_allows() {
    let machine = h100();
    let build = |_: &[Name]| {
        let mut p = ProgramBuilder::new();
        p.function("train", |g| {
            let (row, d) = (dim("row", 8192), dim("d", 256));
            let x = g.input("x", DType::F32, &[row, d.clone()]);
            let layer =
                |x, i| nn::dense(&x, &format!("layer.{i}"), &["d"], std::slice::from_ref(&d), &Dense::default());
            let x = (0..2).fold(x, layer).tanh();
            let scores = x.contract(&x.rename("row", "other"), &["d"]);
            Optimizer::sgd(0.1).apply(g, &scores.tanh().mean_all());
        })?;
        p.finish()
    };
    let found = search(&machine, Devices::Mesh("a=8".parse().unwrap()), machine.memory, &build).find().unwrap();
    let text = found.layout.to_string();
    assert!(text.ends_with("gathers:allow"), "{text}");
    let refused = text.replace("gathers:allow", "gathers:refuse").parse().unwrap();
    assert_eq!(plan(&build(&[]).unwrap(), &found.mesh, &refused).unwrap_err().cause.code(), "L0010");
}

#[test]
fn thousands_of_devices_are_searched_in_seconds() {
    let machine = h100();
    for build in [(|r| Ok(unet(512, 32, 4, r))) as fn(&[Name]) -> Result<Program, Error>, |r| Ok(bert(LARGE, r))] {
        let begun = std::time::Instant::now();
        let found = search(&machine, Devices::Count(4096), machine.memory, &build).find().unwrap();
        assert_eq!((found.mesh.size(), found.planned), (4096, None));
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }
}

/// What is known of one mesh leaves options of others out: none of them is faster than what is found.
#[test]
fn all_meshes_together_have_what_the_best_of_them_has_alone() {
    let machine = h100();
    let models: [fn(&[Name]) -> Result<Program, Error>; 2] =
        [|r| Ok(bert(few_layers(6), r)), |r| Ok(unet(256, 16, 3, r))];
    for build in models {
        let bound = |devices| {
            let search = search(&machine, devices, machine.memory, &build);
            Search { plan: &|_, _, _| Ok(vec![]), ..search }.find().unwrap().bound
        };
        let alone = meshes(16, 8).unwrap().into_iter().map(|mesh| bound(Devices::Mesh(mesh)));
        let (best, found) = (alone.fold(f64::INFINITY, f64::min), bound(Devices::Count(16)));
        // Of meshes that differ by less, that with fewer axes is taken.
        assert!((found / best - 1.0).abs() <= 1e-4, "{found} together, {best} alone");
    }
}

/// Two layers, `a` and `b`, and a loss.
fn two_layers(recompute: &[Name]) -> Result<Program, Error> {
    let mut p = ProgramBuilder::recomputing(recompute);
    p.function("train", |g| {
        let x = g.input("x", DType::F32, &[dim("batch", 2048), dim("d_in", 512)]);
        let options = Dense::default();
        let y = nn::dense(&x, "a", &["d_in"], &[dim("hidden", 2048)], &options).relu();
        let z = nn::dense(&y, "b", &["hidden"], &[dim("out", 1024)], &options);
        let loss = z.square().mean(&["batch", "out"]);
        g.output("loss", &loss);
        Optimizer::adam(0.1).apply(g, &loss).output(g);
    })?;
    p.finish()
}

#[test]
fn no_layout_is_faster_than_what_is_found_by_more_than_2_percent() {
    let machine = h100();
    let dims = ["", "batch", "d_in", "hidden", "out"];
    for mesh in ["p=2", "p=4", "p=2,q=2"] {
        let mesh: Mesh = mesh.parse().unwrap();
        let search = search(&machine, Devices::Mesh(mesh.clone()), machine.memory, &two_layers);
        assert_priced(&search.find().unwrap(), 0.1);
        let search = to_run(search);
        let found = search.find().unwrap();
        // Each axis splits one dimension of each layer, or none.
        let axes = mesh.axes().len() as u32;
        let rules = |mut choice: usize| {
            let mut of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for (axis, _) in mesh.axes() {
                of.entry(dims[choice % dims.len()]).or_default().push(axis);
                choice /= dims.len();
            }
            let rules = dims[1..].iter().map(|d| match of.get(d) {
                Some(axes) => format!("{d}:{}?", axes.join("+")),
                None => format!("{d}:none"),
            });
            rules.collect::<Vec<_>>().join(",")
        };
        let all = mesh.axes().iter().map(|(a, _)| &**a).collect::<Vec<_>>().join("+");
        let sections = ["slots", "gradients", "variables"].map(|s| format!(",{s}{{*:{all}}}"));
        let mut best = f64::INFINITY;
        for (a, b) in (0..dims.len().pow(axes)).flat_map(|a| (0..dims.len().pow(axes)).map(move |b| (a, b))) {
            for stage in [0, 2] {
                let only = |scope: &str, rules: String, keep: &[&str]| {
                    let rules = rules.split(',').filter(|r| keep.contains(&r.split(':').next().unwrap()));
                    format!(",{scope}/**{{{}}}", rules.collect::<Vec<_>>().join(","))
                };
                let [of_a, of_b] = [
                    only("a", rules(a), &["batch", "d_in", "hidden"]),
                    only("b", rules(b), &["batch", "hidden", "out"]),
                ];
                let text = format!("{}{of_a}{of_b}{}", rules(b), sections[..stage].concat());
                best = search.takes(found.chunks, &[], &mesh, &text.parse().unwrap()).unwrap().seconds.min(best);
            }
        }
        let planned = found.planned.unwrap().seconds;
        assert!(planned <= 1.02 * best, "{planned} by {} on {mesh}, and {best} is possible", found.layout);
    }
}
