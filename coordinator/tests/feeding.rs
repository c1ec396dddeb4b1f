//! Feeds by region: sources that are asked for the boxes that devices hold, and for nothing else.

mod common;

use common::run::{options, text};
use common::workers::Workers;
use common::{f32s, i32s};
use coordinator::{Failure, Options, Session, Source};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::nn::{self, Kernel};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use mesh::region::Region;
use proto::control::control_client::ControlClient;
use proto::control::worker_client::WorkerClient;
use proto::control::{ArrayHead, ArrayName, ArrayPart, StatusRequest, array_part::Kind};
use proto::program::DType as WireType;
use std::cell::RefCell;
use std::time::Duration;

/// No test, but what this binary does where it was started as a worker.
#[test]
fn worker_process() {
    common::workers::serve();
}

fn space() -> [Dim; 3] {
    [dim("batch", 2), dim("x", 11), dim("y", 9)]
}

/// A convolution and a dense layer over it, trained on what every voxel is.
fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let labels = g.input("labels", DType::I32, &space());
        let image = g.input("image", DType::F32, &[&space()[..], &[dim("channel", 1)]].concat());
        let weights = g.input("weights", DType::F32, &[dim("class", 3)]);
        let kernel = Kernel::new(&["x", "y"], 3).from_channel("channel");
        let logits = nn::conv(&image, "conv", &kernel, &dim("class", 3)).mul(&weights);
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        Optimizer::sgd(0.1).apply(g, &loss);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

fn feeds() -> [(&'static str, Array); 3] {
    let image = f32s(&[&space()[..], &[dim("channel", 1)]].concat(), 2).1;
    [("labels", i32s(&space(), 1, 3).1), ("image", image), ("weights", f32s(&[dim("class", 3)], 3).1)]
}

/// Even and uneven parts, replicas of some feeds, of all, and of none.
const LAYOUTS: [(&str, &str); 6] =
    [("1", ""), ("a=3", "x:a"), ("a=2,b=3", "x:a,y:b"), ("a=2,b=2", "batch:a,x:b"), ("a=2,b=2", "x:a"), ("a=3", "")];

/// An array that is given by the box, and remembers which were asked for.
struct Counted<'a>(&'a Array, RefCell<Vec<Region>>);

impl<'a> Counted<'a> {
    fn new(array: &'a Array) -> Counted<'a> {
        Counted(array, RefCell::default())
    }
}

impl Source for Counted<'_> {
    fn dtype(&self) -> DType {
        self.0.dtype()
    }
    fn shape(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }
    fn part(&self, at: &Region) -> Result<Array, Box<dyn std::error::Error + Send + Sync>> {
        self.1.borrow_mut().push(at.clone());
        Ok(self.0.part(at))
    }
}

/// Three steps, each fed from `source` of every array: the losses, and the hash of the variables.
fn train(s: &mut Session, feed: impl Fn(&mut Session, &str, &Array)) -> (Vec<Vec<u8>>, String) {
    let f = s.function("train").unwrap();
    let one = |step: u32| {
        feeds().iter().for_each(|(name, array)| feed(s, name, array));
        s.step(f, step).unwrap();
        s.fetch(f, "loss").unwrap().to_bytes()
    };
    ((0..3).map(one).collect(), s.variables_hash().unwrap())
}

fn whole(s: &mut Session) -> (Vec<Vec<u8>>, String) {
    train(s, |s, name, array| s.feed(s.function("train").unwrap(), name, array).unwrap())
}

/// Trains by region; every box that some device holds is asked for once, and they are the whole, each element once.
fn by_region(s: &mut Session) -> (Vec<Vec<u8>>, String) {
    train(s, |s, name, array| {
        let source = Counted::new(array);
        s.feed(s.function("train").unwrap(), name, &source).unwrap();
        let devices = &s.plan().functions[&Name::from("train")];
        let held = |d: &mesh::plan::DevicePlan| {
            d.inputs.iter().find(|(n, _, _)| **n == *name).map(|(_, part, _)| part.region.clone()).unwrap()
        };
        let mut owned: Vec<Region> = vec![];
        devices.iter().map(held).for_each(|at| {
            if !owned.contains(&at) {
                owned.push(at)
            }
        });
        let asked = source.1.into_inner();
        assert_eq!(asked, owned, "{name} on {}", s.plan().mesh);
        let elements: usize = asked.iter().map(Region::elements).sum();
        assert_eq!(elements, array.shape().iter().product::<usize>(), "elements of {name} that were made");
    })
}

#[test]
fn a_session_fed_by_regions_gives_the_bits_of_one_fed_by_arrays_and_makes_each_element_once() {
    let one = whole(&mut Session::embedded(program(), &options("1", "")).unwrap());
    for (mesh, layout) in LAYOUTS {
        let session = || Session::embedded(program(), &options(mesh, layout)).unwrap();
        assert_eq!(whole(&mut session()), one, "arrays on {mesh} with {layout}");
        assert_eq!(by_region(&mut session()), one, "regions on {mesh} with {layout}");
    }
}

const SOON: Duration = Duration::from_secs(30);

#[test]
fn so_does_one_on_worker_processes_with_several_devices_each() {
    let one = whole(&mut Session::embedded(program(), &options("1", "")).unwrap());
    let workers = Workers::start(&["--devices cpu:2".into(), "--devices cpu:4".into()], SOON);
    for (mesh, layout) in LAYOUTS {
        assert_eq!(by_region(&mut workers.session(program(), &options(mesh, layout))), one, "{mesh} with {layout}");
        assert_eq!(whole(&mut workers.session(program(), &options(mesh, layout))), one, "{mesh} with {layout}");
    }
}

/// A source that says one thing and gives another from some box on.
struct Bad {
    says: (DType, Vec<usize>),
    /// What it gives: the box of this, or something else.
    array: Array,
    boxes: RefCell<usize>,
    gives: fn(usize, &Array, &Region) -> Result<Array, &'static str>,
}

impl Source for Bad {
    fn dtype(&self) -> DType {
        self.says.0
    }
    fn shape(&self) -> Vec<usize> {
        self.says.1.clone()
    }
    fn part(&self, at: &Region) -> Result<Array, Box<dyn std::error::Error + Send + Sync>> {
        *self.boxes.borrow_mut() += 1;
        Ok((self.gives)(*self.boxes.borrow(), &self.array, at)?)
    }
}

fn bad_sources_lose_nothing(session: impl Fn(&Options) -> Session) {
    let expected = whole(&mut Session::embedded(program(), &options("1", "")).unwrap());
    let mut s = session(&options("a=3", "x:a"));
    let f = s.function("train").unwrap();
    let image = feeds()[1].1.clone();
    let says = (DType::F32, image.shape().to_vec());
    let bad = |says, gives| Bad { says, array: image.clone(), boxes: RefCell::new(0), gives };
    let good = |_: usize, array: &Array, at: &Region| Ok(array.part(at));

    // What it says is wrong: it is asked for nothing.
    for says in [(DType::I32, says.1.clone()), (DType::F32, vec![2, 11, 9]), (DType::F32, vec![2, 9, 11, 1])] {
        let source = bad(says, good);
        let e = text(s.feed(f, "image", &source));
        assert!(
            e.contains("P0004") && e.contains("feed `image` is f32[batch:2, x:11, y:9, channel:1], and was"),
            "{e}"
        );
        assert_eq!(*source.boxes.borrow(), 0);
    }
    // The first box is wrong: nothing has been touched, and what was fed before is still there.
    feeds().iter().for_each(|(name, array)| s.feed(f, name, array).unwrap());
    let e = text(s.feed(f, "image", &bad(says.clone(), |_, array, _| Ok(array.clone()))));
    assert!(e.contains("feed `image` at [batch:0..2, x:0..") && e.contains("gave f32 of shape [2, 11, 9, 1]"), "{e}");
    assert!(s.lost().is_none());
    let mut losses = vec![];
    s.step(f, 0).unwrap();
    losses.push(s.fetch(f, "loss").unwrap().to_bytes());
    // A later one is: the step waits for another feed, and the variables are as they were.
    let wrong: [fn(usize, &Array, &Region) -> Result<Array, &'static str>; 3] = [
        |n, array, at| if n < 2 { Ok(array.part(at)) } else { Err("the disk is gone") },
        |n, array, at| Ok(if n < 3 { array.part(at) } else { Array::scalar(0.0) }),
        |n, array, at| {
            Ok(if n < 2 { array.part(at) } else { Array::I32(array.part(at).as_f32().unwrap().mapv(|v| v as i32)) })
        },
    ];
    for (gives, says_what) in wrong.into_iter().zip(["the disk is gone", "gave f32 of shape []", "gave i32 of shape"]) {
        let e = s.feed(f, "image", &bad(says.clone(), gives)).unwrap_err();
        assert!(e.to_string().contains(says_what) && e.to_string().contains("feed `image` at [batch:0..2, x:"), "{e}");
        assert_eq!(e.exit_code(), if says_what.starts_with("the disk") { 3 } else { 2 });
        assert_eq!(matches!(e, Failure::Source { .. }), says_what.starts_with("the disk"));
        let e = text(s.step(f, 1));
        assert!(e.contains("feed `image` failed midway") && e.contains("help: feed it anew"), "{e}");
        assert!(s.lost().is_none());
    }
    for step in 1..3 {
        s.feed(f, "image", &bad(says.clone(), good)).unwrap();
        s.step(f, step).unwrap();
        losses.push(s.fetch(f, "loss").unwrap().to_bytes());
    }
    assert_eq!((losses, s.variables_hash().unwrap()), expected);
}

#[test]
fn a_bad_source_is_an_error_that_loses_nothing() {
    bad_sources_lose_nothing(|options| Session::embedded(program(), options).unwrap());
}

#[test]
fn so_it_is_for_worker_processes() {
    let workers = Workers::start(&["--devices cpu:1".into(), "--devices cpu:2".into()], SOON);
    bad_sources_lose_nothing(|options| workers.session(program(), options));
}

/// What comes over the wire is held to what the devices have, whoever sends it.
#[test]
fn boxes_that_no_device_holds_and_streams_that_break_off_are_refused_and_the_session_goes_on() {
    let workers = Workers::start(&["--devices cpu:1".into(), "--devices cpu:2".into()], SOON);
    let expected = whole(&mut Session::embedded(program(), &options("1", "")).unwrap());
    let mut s = workers.session(program(), &options("a=3", "x:a"));
    let region = s.plan().functions[&Name::from("train")][1]
        .inputs
        .iter()
        .find(|(n, _, _)| **n == *"labels")
        .unwrap()
        .1
        .region
        .clone();
    let start: Vec<u64> = region.0.iter().map(|(_, r)| r.start as u64).collect();
    let shape: Vec<u64> = region.shape().iter().map(|n| *n as u64).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = tonic::transport::Endpoint::from_shared(workers.url.clone()).unwrap();
    let mut client = ControlClient::new(runtime.block_on(endpoint.connect()).unwrap());
    let epoch = runtime.block_on(client.status(StatusRequest {})).unwrap().into_inner().epoch;
    let mut send = |function: &str, name: &str, dtype: WireType, start: &[u64], shape: &[u64], data: &[usize]| {
        let name = ArrayName { epoch, function: function.into(), name: name.into() };
        let (start, shape) = (start.to_vec(), shape.to_vec());
        // That a model program names other devices changes nothing.
        let head = ArrayHead { name: Some(name), dtype: dtype.into(), start, shape, holders: vec![7, 0, 0] };
        let data = data.iter().map(|n| Kind::Data(vec![1; *n].into()));
        let parts: Vec<_> =
            std::iter::once(Kind::Head(head)).chain(data).map(|k| ArrayPart { kind: Some(k) }).collect();
        let parts = tokio_stream::iter(parts);
        let sent = runtime
            .block_on(async { if function.is_empty() { client.set(parts).await } else { client.feed(parts).await } });
        sent.map_or_else(|e| e.message().to_string(), |_| "taken".into())
    };
    let bytes = region.elements() * 4;
    let labels = |start: &[u64], shape: &[u64], data: &[usize]| {
        ("labels", WireType::I32, start.to_vec(), shape.to_vec(), data.to_vec())
    };
    let beyond: Vec<u64> = start.iter().map(|s| s + 100).collect();
    let cases = [
        (labels(&[0, 0, 0], &[2, 11, 9], &[792]), "C0013: no device holds the box of `labels`"),
        (labels(&beyond, &shape, &[bytes]), "C0013: no device holds the box"),
        (labels(&[u64::MAX; 3], &shape, &[bytes]), "C0013: no device holds the box"),
        (labels(&[0, 1, 0], &shape, &[bytes]), "C0013: no device holds the box"),
        (labels(&start, &shape[..2], &[bytes]), "start and extents do not belong together"),
        (labels(&start, &[u64::MAX; 3], &[bytes]), "beyond all bounds"),
        (labels(&start, &shape, &[bytes + 4]), "do not follow each other"),
        (labels(&start, &shape, &[bytes, 4]), "do not follow each other"),
        (labels(&start, &shape, &[bytes - 4]), "4 bytes of an array are missing"),
        (labels(&start, &shape, &[]), "bytes of an array are missing"),
        (("labels", WireType::F32, start.clone(), shape.clone(), vec![bytes]), "C0013: no device holds the box"),
        (("labels", WireType::Unspecified, start.clone(), shape.clone(), vec![bytes]), "is no dtype"),
        (("lables", WireType::I32, start.clone(), shape.clone(), vec![bytes]), "C0014"),
        (("loss", WireType::F32, vec![], vec![], vec![4]), "C0014: `train` is not fed `loss`"),
    ];
    for ((name, dtype, start, shape, data), why) in &cases {
        let said = send("train", name, *dtype, start, shape, data);
        assert!(said.contains(why), "{name} {start:?} {shape:?}: {said}");
        assert!(send("", name, *dtype, start, shape, data) != "taken");
    }
    assert_eq!(send("train", "labels", WireType::I32, &start, &shape, &[bytes / 2, bytes / 2]), "taken");

    // A worker does not take a coordinator's word for it either.
    let status = runtime.block_on(client.status(StatusRequest {})).unwrap().into_inner();
    let with_two = status.workers.iter().find(|w| w.devices == 2).unwrap();
    let url = format!("http://{}", with_two.address.trim_start_matches("http://"));
    let endpoint = tonic::transport::Endpoint::from_shared(url).unwrap();
    let mut worker = WorkerClient::new(runtime.block_on(endpoint.connect()).unwrap());
    let mut own: Vec<u32> = vec![];
    let mut direct = |name: &str, holders: &[u32], start: &[u64], shape: &[u64], bytes: usize| {
        let name = ArrayName { epoch, function: "train".into(), name: name.into() };
        let (start, shape, holders) = (start.to_vec(), shape.to_vec(), holders.to_vec());
        let head = ArrayHead { name: Some(name), dtype: WireType::I32.into(), start, shape, holders };
        let parts = [Kind::Head(head), Kind::Data(vec![1; bytes].into())].map(|k| ArrayPart { kind: Some(k) });
        let sent = runtime.block_on(worker.feed(tokio_stream::iter(parts)));
        sent.map_or_else(|e| e.message().to_string(), |_| "taken".into())
    };
    for device in 0..3u32 {
        let said = direct("labels", &[device], &start, &shape, bytes);
        match said.split(':').next() {
            // Of the three parts this is the second device's.
            Some("taken") => assert_eq!(device, 1),
            Some("W0024") => {
                assert!(said.contains("`labels`, i32[batch:2, x:11, y:9], and was sent the box of"), "{said}")
            }
            _ => assert!(said.contains("W0022"), "{said}"),
        }
        if !said.contains("W0022") {
            own.push(device);
        }
    }
    assert_eq!(own.len(), 2);
    assert!(direct("labels", &[own[0]; 3], &start, &shape, bytes).contains("W0022: more devices"));
    assert!(direct("labels", &own, &start, &shape, bytes).contains("W0024"), "one of them holds another box");
    assert!(direct("labels", &own[..1], &start, &shape, bytes - 4).contains("are missing"));
    assert!(direct("loss", &own[..1], &[], &[], 4).contains("W0025: `loss` is a result of `train`"));
    assert_eq!(whole(&mut s), expected);
}
