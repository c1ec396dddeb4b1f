//! A session: a program planned for a mesh and running on it, driven step by step from the model program.

use crate::checkpoint::{Checkpoints, Newest, Position, Restored};
use crate::error::{Failure, feed};
use crate::interrupt;
use crate::keeper::Keeper;
use crate::profile::{Clock, Profile};
use crate::remote::Remote;
use crate::source::{Piece, Source, pieces};
use mesh::array::Array;
use mesh::dim::Name;
use mesh::error::nearest;
use mesh::layout::{Layout, Mesh};
use mesh::plan::{PlanOptions, ProgramPlan, plan_program};
use mesh::program::Program;
use proto::control::{DeviceEvents, FunctionTimes};
use std::time::{Duration, Instant};
use worker::device::Device;
use worker::group::{DeviceGroup, carried};
use worker::kernels::kernel::CpuBackend;
use worker::service::over_both;
use worker::tls::Tls;
use worker::transport::connector::TransportChoice;
use worker::watch::{NonFinite, Origin};

/// How long a session that has lost its coordinator looks for it, and how often.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(200);

/// Where and how a program runs. None of it changes a bit of the results, but for the seed.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The mesh; a single device as given here.
    pub mesh: Mesh,
    /// Which dimension is split over which axis.
    pub layout: Layout,
    /// Devices there are, if that is to be checked against the mesh.
    pub devices: Option<usize>,
    /// Threads of each device; None for the machine's cores shared out, at least one each.
    pub threads: Option<usize>,
    /// Bytes that each device may use; None for no limit.
    pub memory: Option<usize>,
    /// Seed of every random number of the run.
    pub seed: u64,
    /// How the devices of worker processes reach each other.
    pub transport: TransportChoice,
    /// TLS to a coordinator.
    pub tls: Option<Tls>,
    /// Where checkpoints go, if any are to be written or read.
    pub checkpoints: Option<Checkpoints>,
    /// Whether to go on with a smaller mesh when workers are lost and none take their place.
    pub shrink: bool,
    /// Whether devices of this process wait for each other in every collective ([`PlanOptions::waiting`]): for measurements.
    pub waiting: bool,
}

impl Options {
    /// Threads of each device.
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        self.threads.unwrap_or(cores / self.mesh.size().max(1)).max(1)
    }

    /// These options for a part of a program, with the rules of the layout that concern it.
    pub fn of(&self, part: &Program, whole: &Program) -> Options {
        Options { layout: self.layout.of(part, whole), ..self.clone() }
    }

    /// The plan of a program under these options.
    pub fn plan(&self, program: &Program) -> Result<ProgramPlan, mesh::error::Error> {
        let options = PlanOptions { memory: self.memory, devices: self.devices, apart: false, waiting: self.waiting };
        plan_program(program, &self.mesh, &self.layout, &options, &CpuBackend { threads: self.threads() })
    }
}

/// A device's memory in bytes, at the most so far: of every stage since the session began or was set to a checkpoint of
/// another stage, and of every change of stage, while which the memory of both is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Peak {
    /// What the plans say.
    pub peak_bytes_predicted: usize,
    /// What was in use.
    pub peak_bytes_measured: usize,
}

/// What a program would take of a device, in bytes.
pub(crate) struct Need {
    /// What the program that is there takes.
    pub now: usize,
    /// What the other one would take.
    pub other: usize,
    /// What may be used, if there is a limit.
    pub budget: Option<usize>,
}

/// A function of a session, looked up once; steps use it without names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionId(usize);

/// Where the devices are.
enum Engine {
    /// In this process.
    Embedded(DeviceGroup, Option<Keeper>),
    /// In worker processes, behind a coordinator.
    Remote(Box<Remote>),
}

/// A program that runs on a mesh.
pub struct Session {
    /// All of its stages.
    whole: Program,
    /// The stage that it is in; empty if there are none.
    stage: Name,
    /// The program of that stage.
    program: Program,
    plan: ProgramPlan,
    engine: Engine,
    options: Options,
    /// What came up first that is not finite, if that is watched for.
    watched: Option<Vec<NonFinite>>,
    /// By function of the plan.
    clocks: Vec<Clock>,
    /// Feeds that failed midway.
    torn: Vec<(FunctionId, Name)>,
}

impl Session {
    /// Plans a program for a mesh inside this process, loads it and sets its variables to their start.
    ///
    /// # Errors
    /// A layout that does not fit the program or the mesh, a plan over the memory allowed: before anything runs.
    pub fn embedded(program: Program, options: &Options) -> Result<Session, Failure> {
        let (stage, first) = first_stage(&program)?;
        let plan = options.of(&first, &program).plan(&first)?;
        let keeper = options.checkpoints.as_ref().map(Keeper::new).transpose()?;
        let mesh = DeviceGroup::embedded(&plan, options.threads(), options.seed)?;
        Session::begin(program, (stage, first), plan, Engine::Embedded(mesh, keeper), options)
    }

    /// The same on the workers of a coordinator: `http://host:port`. Nothing else is different, nor is any bit.
    ///
    /// # Errors
    /// As for [`Session::embedded`]; a coordinator that is not there or has too few workers.
    pub fn connect(url: &str, program: Program, options: &Options) -> Result<Session, Failure> {
        let (stage, first) = first_stage(&program)?;
        // A coordinator makes plans of its own.
        let options = &Options { waiting: false, ..options.clone() };
        // What is wrong with the plan is said before anybody is called.
        let of_stage = options.of(&first, &program);
        let plan = of_stage.plan(&first)?;
        let remote = Remote::open(url, &first, &of_stage, &stage, (0, false))?;
        let plan = remote.plan(&first, &of_stage, plan)?;
        Session::begin(program, (stage, first), plan, Engine::Remote(Box::new(remote)), options)
    }

    fn begin(
        whole: Program,
        (stage, program): (Name, Program),
        plan: ProgramPlan,
        engine: Engine,
        options: &Options,
    ) -> Result<Session, Failure> {
        let (options, clocks) = (options.clone(), vec![Clock::default(); plan.functions.len()]);
        let mut session = Session { whole, stage, program, plan, engine, options, watched: None, clocks, torn: vec![] };
        session.init()?;
        Ok(session)
    }

    /// The stage of the program that the session is in; empty if there are none.
    pub fn stage(&self) -> &str {
        &self.stage
    }

    /// Goes on in another stage of the program. Variables that both stages have keep their values, and the others start,
    /// on the devices where they are.
    ///
    /// With `through` that function is run in between, on the variables that it uses of both stages: it sets those of the
    /// new stage from those of the old one.
    ///
    /// A change needs the memory of the plan before and of the one after it at once; with `through` there are two changes.
    ///
    /// # Errors
    /// No such stage or function; more memory than allowed, by the options or by a worker; a session that is lost. In the
    /// first two cases the session is as it was.
    pub fn enter(&mut self, stage: &str, through: Option<&str>) -> Result<(), Failure> {
        let next = self.whole.stage(stage)?;
        let plan = self.plan_here(&next)?;
        let last = self.foresee(&next, &plan)?;
        if let Some(function) = through {
            let between = self.whole.only(&[function.into()])?;
            let plan_between = self.plan_here(&between)?;
            let first = self.foresee(&between, &plan_between)?;
            // Both changes are looked at before the first one, from which there is no way back.
            fits(first.iter().map(|n| (n.now + n.other, n.budget)))?;
            fits(first.iter().zip(&last).map(|(n, m)| (n.other + m.other, m.budget)))?;
            self.switch(stage, between, plan_between)?;
            let f = self.function(function)?;
            self.step(f, 0)?;
        } else {
            fits(last.iter().map(|n| (n.now + n.other, n.budget)))?;
        }
        self.switch(stage, next, plan)?;
        self.stage = stage.into();
        Ok(())
    }

    /// The plan of a part of the program on the mesh that the session has, which may be smaller than the one asked for.
    fn plan_here(&self, part: &Program) -> Result<ProgramPlan, Failure> {
        let options = self.options.of(part, &self.whole);
        Ok(Options { mesh: self.plan.mesh.clone(), devices: None, ..options }.plan(part)?)
    }

    /// What a program would take of each device, by device; workers plan for themselves, and have limits of their own.
    fn foresee(&self, program: &Program, plan: &ProgramPlan) -> Result<Vec<Need>, Failure> {
        let need = |d| Need { now: self.plan.peak_bytes(d), other: plan.peak_bytes(d), budget: self.options.memory };
        match &self.engine {
            Engine::Embedded(..) => Ok((0..plan.mesh.size()).map(need).collect()),
            Engine::Remote(r) => r.foresee(program, &plan.layout),
        }
    }

    /// Puts another program on the devices; variables of the same name keep their values.
    fn switch(&mut self, stage: &str, program: Program, plan: ProgramPlan) -> Result<(), Failure> {
        let options = self.options.of(&program, &self.whole);
        match &mut self.engine {
            Engine::Embedded(old, _) => {
                let pairs = carried((&program, &plan), (&self.program, &self.plan));
                let pairs = pairs.map_err(|v| Failure::Mesh(format!("C0040: `{v}` has another layout now")))?;
                let mut new = DeviceGroup::embedded(&plan, self.options.threads(), self.options.seed)?;
                if let Some(init) = plan.functions.keys().position(|n| **n == *"init") {
                    new.run(init, 0).map_err(|e| Failure::Mesh(e.to_string()))?;
                }
                new.succeed(old, &pairs);
                *old = new;
                self.plan = plan;
            }
            Engine::Remote(old) => {
                let opened = Remote::open(&old.url, &program, &options, stage, (old.epoch, true));
                let mut remote = match opened {
                    Ok(remote) => remote,
                    Err(failure) => {
                        if let Failure::Lost(why) = &failure {
                            old.give_up(why);
                        }
                        return Err(failure);
                    }
                };
                self.plan = remote.plan(&program, &options, plan)?;
                remote.hear(old.notes());
                **old = remote;
            }
        }
        self.program = program;
        self.clocks = vec![Clock::default(); self.plan.functions.len()];
        self.torn.clear();
        Ok(())
    }

    /// Sets the variables to their start.
    fn init(&mut self) -> Result<(), Failure> {
        let init = self.function("init")?;
        self.step(init, 0)
    }

    /// Why the session is lost, if it is: workers or the coordinator are gone. It may be opened anew.
    pub fn lost(&self) -> Option<String> {
        match &self.engine {
            Engine::Embedded(..) => None,
            Engine::Remote(r) => r.lost(),
        }
    }

    /// Opens a session on workers anew, with those that there are now, and sets the variables to the newest good
    /// checkpoint, or to their start where there is none. Waits for the coordinator and for enough workers.
    ///
    /// # Errors
    /// [`Failure::Lost`] if they do not come back in time.
    pub fn reopen(&mut self) -> Result<Option<Restored>, Failure> {
        let begun = Instant::now();
        loop {
            match self.open_anew() {
                Err(Failure::Lost(_)) if begun.elapsed() < PATIENCE && !interrupt::asked() => {
                    std::thread::sleep(RETRY);
                }
                done => return done,
            }
        }
    }

    fn open_anew(&mut self) -> Result<Option<Restored>, Failure> {
        if let Engine::Embedded(..) = &self.engine {
            return Err(Failure::Mesh("devices of this process cannot be opened anew".into()));
        }
        self.rewind()
    }

    /// Sets the variables to the newest good checkpoint, or to their start where there is none, in the stage of that.
    ///
    /// # Errors
    /// A session that is lost; as for [`Session::restore`].
    pub fn rewind(&mut self) -> Result<Option<Restored>, Failure> {
        // A run that has no checkpoint yet begins in the first stage.
        let (stage, program) = first_stage(&self.whole)?;
        self.begin_stage(stage, program)?;
        if self.options.checkpoints.is_some() { self.restore() } else { Ok(None) }
    }

    /// Puts a stage on the devices, with its variables at their start.
    fn begin_stage(&mut self, stage: Name, program: Program) -> Result<(), Failure> {
        let options = self.options.of(&program, &self.whole);
        let plan = options.plan(&program)?;
        match &mut self.engine {
            Engine::Embedded(mesh, _) => {
                // The memory of the old stage goes first: nothing of it is kept.
                *mesh = DeviceGroup::new(&self.plan, vec![], 1, self.options.seed);
                *mesh = DeviceGroup::embedded(&plan, self.options.threads(), self.options.seed)?;
                self.plan = plan;
            }
            Engine::Remote(old) => {
                let mut remote = Remote::open(&old.url, &program, &options, &stage, (old.epoch, false))?;
                self.plan = remote.plan(&program, &options, plan)?;
                remote.hear(old.notes());
                **old = remote;
            }
        }
        (self.stage, self.program) = (stage, program);
        self.clocks = vec![Clock::default(); self.plan.functions.len()];
        self.torn.clear();
        self.init()
    }

    /// Begins a checkpoint: when this returns the variables are copied, and training may go on while they are written.
    /// One that is still being written is waited for. If one fails, [`Session::notes`] says so.
    ///
    /// # Errors
    /// A session without a place for checkpoints; a session that is lost.
    pub fn checkpoint(&mut self, position: &Position) -> Result<(), Failure> {
        match &mut self.engine {
            Engine::Embedded(mesh, Some(keeper)) => {
                keeper.begin(&self.program, &self.plan, mesh, position, self.options.seed, &self.stage)
            }
            Engine::Embedded(_, None) => Err(no_place()),
            Engine::Remote(r) => r.checkpoint(position),
        }
    }

    /// Waits until the checkpoint that is being written, if one is, counts.
    ///
    /// # Errors
    /// A checkpoint that could not be written; a session that is lost.
    pub fn settle(&mut self) -> Result<(), Failure> {
        match &mut self.engine {
            Engine::Embedded(_, Some(keeper)) => keeper.settle(),
            Engine::Embedded(_, None) => Ok(()),
            Engine::Remote(r) => r.settle(),
        }
    }

    /// Sets the variables to the newest good checkpoint, which any mesh may have written, and the session to the stage it is
    /// of. Damaged ones are passed over and noted. None if there is no checkpoint at all.
    ///
    /// # Errors
    /// No good one among those that there are; one of another program. The variables are as they were then, or, where
    /// checkpoints are of another stage, at their start.
    pub fn restore(&mut self) -> Result<Option<Restored>, Failure> {
        let mut passed = Vec::new();
        loop {
            let newest = match &mut self.engine {
                Engine::Embedded(mesh, Some(keeper)) => {
                    keeper.restore(&self.program, &self.plan, mesh, &self.stage, &mut passed)?
                }
                Engine::Embedded(_, None) => return Err(no_place()),
                Engine::Remote(r) => r.restore(&mut passed)?,
            };
            match newest {
                Newest::None => return Ok(None),
                Newest::Restored(restored) => return Ok(Some(restored)),
                Newest::OfStage(stage) => {
                    let program = self.whole.stage(&stage).map_err(|e| {
                        Failure::Checkpoint(format!(
                            "C0041: the newest checkpoint is of a stage of another program: {e}"
                        ))
                    })?;
                    self.begin_stage(stage.into(), program)?;
                }
            }
        }
    }

    /// What the user should know and was not told yet: checkpoints that failed or were passed over.
    pub fn notes(&mut self) -> Vec<String> {
        match &mut self.engine {
            Engine::Embedded(_, keeper) => keeper.as_mut().map(Keeper::notes).unwrap_or_default(),
            Engine::Remote(r) => r.notes(),
        }
    }

    /// Whether workers are about to leave, or there are now enough for the whole mesh again: time for a checkpoint and
    /// [`Session::reopen`].
    pub fn regroup(&self) -> bool {
        match &self.engine {
            Engine::Embedded(..) => false,
            Engine::Remote(r) => r.regroup(),
        }
    }

    /// Where and how it runs; the mesh is the one asked for, which [`Session::plan`]'s need not be.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// How devices in worker processes reach their peers, a line each; none in one process.
    pub fn links(&self) -> &[String] {
        match &self.engine {
            Engine::Embedded(..) => &[],
            Engine::Remote(r) => &r.links,
        }
    }

    /// The program of the stage that it is in.
    pub fn program(&self) -> &Program {
        &self.program
    }
    /// Its plan.
    pub fn plan(&self) -> &ProgramPlan {
        &self.plan
    }
    /// Seed of the run.
    pub fn seed(&self) -> u64 {
        self.options.seed
    }

    /// Looks a function up.
    pub fn function(&self, name: &str) -> Result<FunctionId, Failure> {
        self.program.function(name)?;
        // Functions are numbered in the order of the plan's map, on devices too.
        let index = self.plan.functions.keys().position(|n| **n == *name);
        index.map(FunctionId).ok_or_else(|| Failure::Mesh(format!("`{name}` is not loaded")))
    }

    fn function_name(&self, f: FunctionId) -> &Name {
        self.plan.functions.keys().nth(f.0).expect("made by `function`")
    }

    fn device_plan(&self, f: FunctionId) -> &mesh::plan::DevicePlan {
        // Functions are numbered in the order of the plan's map.
        &self.plan.functions.values().nth(f.0).expect("made by `function`")[0]
    }

    /// Feeds a function from an array, or from another [`Source`], which is asked for nothing but the boxes that devices hold;
    /// what is fed stays for the steps to come, until something else is fed or another function runs.
    ///
    /// # Errors
    /// A name that is no feed of the function; a source of another type, or one that fails. If it fails midway, the function
    /// does not run before it is fed anew; nothing else is lost.
    pub fn feed(&mut self, f: FunctionId, name: &str, source: &dyn Source) -> Result<(), Failure> {
        let inputs = &self.device_plan(f).inputs;
        let Some(index) = inputs.iter().position(|(n, _, _)| **n == *name) else {
            let near = nearest(name, inputs.iter().map(|(n, _, _)| &**n));
            let help = near.map_or("see the program's inputs".into(), |n| format!("did you mean `{n}`?"));
            return Err(feed(format!("the function takes no feed `{name}`"), help));
        };
        let (function, devices) = self.plan.functions.iter().nth(f.0).expect("made by `function`");
        let what = format!("feed `{name}`");
        let held = devices.iter().map(|d| &d.inputs[index].1.region);
        let mut made = 0;
        let pieces =
            pieces(&what, &devices[0].inputs[index].1.ty, held, source)?.inspect(|p| made += usize::from(p.is_ok()));
        let fed = match &mut self.engine {
            Engine::Embedded(mesh, _) => put(mesh, pieces, |device, array| device.feed(f.0, index, array)),
            Engine::Remote(r) => r.send(function, name, pieces),
        };
        let (of, name) = (f, Name::from(name));
        self.torn.retain(|torn| *torn != (of, name.clone()));
        if fed.is_err() && made > 0 {
            self.torn.push((of, name));
        }
        fed
    }

    /// Runs a function as step `step`, with what was fed. Allocates nothing.
    ///
    /// # Errors
    /// A feed that failed midway; devices that fail; a session that is lost.
    pub fn step(&mut self, f: FunctionId, step: u32) -> Result<(), Failure> {
        if let Some((_, name)) = self.torn.iter().find(|(of, _)| *of == f) {
            return Err(feed(format!("feed `{name}` failed midway, and is of two kinds now"), "feed it anew"));
        }
        let (begun, watch) = (Instant::now(), self.watched.is_some());
        let seen = match &mut self.engine {
            Engine::Embedded(mesh, _) => {
                if watch {
                    mesh.watch(Some(&self.program));
                }
                mesh.run(f.0, step).map_err(|e| Failure::Mesh(e.to_string()))?;
                let seen = if watch { mesh.non_finite() } else { vec![] };
                if watch {
                    mesh.watch(None);
                }
                seen
            }
            Engine::Remote(r) => {
                let name = self.plan.functions.keys().nth(f.0).expect("made by `function`");
                r.step(name, step, watch)?
            }
        };
        self.clocks[f.0].add(begun.elapsed());
        if let Some(first) = self.watched.as_mut().filter(|first| first.is_empty()) {
            *first = seen;
        }
        Ok(())
    }

    /// Watches for values that are not finite in the steps from now on, or no more: slower, and of no other effect. What is
    /// infinite counts only where finite values became so ([`worker::watch`]): a mask of -inf is no finding.
    pub fn watch(&mut self, on: bool) {
        self.watched = on.then(Vec::new);
    }

    /// What came up first that is not finite, in the first watched step that had any: a line for infinite values, and one
    /// for those that are no numbers, in their order.
    pub fn non_finite(&self) -> Vec<String> {
        let mut found = self.watched.clone().unwrap_or_default();
        found.sort_by(|a, b| b.before(a).cmp(&a.before(b)));
        let text = |f: &NonFinite| match f.origin {
            Origin::Step(_) => f.text.clone(),
            Origin::Variable(v) => {
                let name = self.program.variables.get(v).map_or("", |v| &*v.name);
                format!("the variable `{name}`, before the step: {}", f.text)
            }
        };
        found.iter().map(text).collect()
    }

    /// The names of a function's results.
    pub fn results(&self, f: FunctionId) -> impl Iterator<Item = &str> {
        self.device_plan(f).outputs.iter().map(|(name, _, _)| &**name)
    }

    /// A result of the function that ran last.
    pub fn fetch(&self, f: FunctionId, name: &str) -> Result<Array, Failure> {
        let outputs = &self.device_plan(f).outputs;
        let Some(index) = outputs.iter().position(|(n, _, _)| **n == *name) else {
            let near = nearest(name, outputs.iter().map(|(n, _, _)| &**n));
            let help = near.map_or("see the program's outputs".into(), |n| format!("did you mean `{n}`?"));
            return Err(feed(format!("the function has no result `{name}`"), help));
        };
        let ty = &outputs[index].1.ty;
        match &self.engine {
            Engine::Embedded(mesh, _) => {
                let mut array = Array::zeros(ty.dtype, &ty.shape());
                (0..mesh.size()).for_each(|d| mesh.device(d).fetch(f.0, index, &mut array));
                Ok(array)
            }
            Engine::Remote(r) => r.fetch(self.function_name(f), name),
        }
    }

    /// Feeds, runs and fetches everything: the convenient way.
    pub fn run(&mut self, function: &str, step: u32, feeds: &[(&str, &Array)]) -> Result<Vec<(Name, Array)>, Failure> {
        let f = self.function(function)?;
        for (name, _, _) in &self.device_plan(f).inputs {
            if !feeds.iter().any(|(n, _)| *n == &**name) {
                return Err(feed(format!("`{function}` is not fed `{name}`"), "feed an array for each input"));
            }
        }
        for (name, array) in feeds {
            self.feed(f, name, *array)?;
        }
        self.step(f, step)?;
        let names: Vec<Name> = self.device_plan(f).outputs.iter().map(|(n, _, _)| n.clone()).collect();
        names.into_iter().map(|n| Ok((n.clone(), self.fetch(f, &n)?))).collect()
    }

    fn variable_index(&self, name: &str) -> Result<usize, Failure> {
        self.program.variable(name).map(|v| v.index()).ok_or_else(|| {
            let near = nearest(name, self.program.variables.iter().map(|v| &*v.name));
            let help = near.map_or("see the program's variables".into(), |n| format!("did you mean `{n}`?"));
            feed(format!("the program has no variable `{name}`"), help)
        })
    }

    /// A variable's value, whole.
    pub fn variable(&self, name: &str) -> Result<Array, Failure> {
        let index = self.variable_index(name)?;
        let ty = &self.program.variables[index].ty;
        match &self.engine {
            Engine::Embedded(mesh, _) => {
                let mut array = Array::zeros(ty.dtype, &ty.shape());
                (0..mesh.size()).for_each(|d| mesh.device(d).variable(index, &mut array));
                Ok(array)
            }
            Engine::Remote(r) => r.fetch("", name),
        }
    }

    /// Sets a variable.
    pub fn set_variable(&mut self, name: &str, array: &Array) -> Result<(), Failure> {
        let index = self.variable_index(name)?;
        let ty = &self.program.variables[index].ty;
        let (what, held) = (format!("variable `{name}`"), self.plan.variables.iter().map(|d| &d[index].0.region));
        let pieces = pieces(&what, ty, held, array)?;
        match &mut self.engine {
            Engine::Embedded(mesh, _) => put(mesh, pieces, |device, array| device.set_variable(index, array)),
            Engine::Remote(r) => r.send("", name, pieces),
        }
    }

    /// BLAKE3 over all variables and optimizer slots, unsharded: by name, of name, type and bytes.
    pub fn variables_hash(&self) -> Result<String, Failure> {
        let mut names: Vec<&Name> = self.program.variables.iter().map(|v| &v.name).collect();
        names.sort();
        let mut hasher = blake3::Hasher::new();
        for name in names {
            let array = self.variable(name)?;
            hasher.update(name.as_bytes()).update(format!("{}{:?}", array.dtype(), array.shape()).as_bytes());
            hasher.update(&array.to_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Predicted and measured memory of each device, at the most so far.
    ///
    /// # Errors
    /// Workers that do not answer.
    pub fn peaks(&self) -> Result<Vec<Peak>, Failure> {
        let peak =
            |p: worker::device::Peak| Peak { peak_bytes_predicted: p.predicted, peak_bytes_measured: p.measured };
        match &self.engine {
            Engine::Embedded(mesh, _) => Ok((0..mesh.size()).map(|d| peak(mesh.device(d).peak())).collect()),
            Engine::Remote(r) => r.peaks(),
        }
    }

    /// What each device did last ([`worker::recorder`]), on one clock: by device, oldest first; several messages for a
    /// device with many events. Can be asked between steps, and tells of the last four at the least.
    ///
    /// # Errors
    /// A session that is lost.
    pub fn events(&self) -> Result<Vec<DeviceEvents>, Failure> {
        match &self.engine {
            Engine::Embedded(mesh, _) => Ok(mesh.recorders().iter().flat_map(|(d, r)| r.events(*d)).collect()),
            Engine::Remote(r) => r.events(),
        }
    }

    /// How long the device that communicated longest did so in the last step: waiting for others is part of it.
    pub fn communicated(&self) -> Duration {
        Duration::from_nanos(match &self.engine {
            Engine::Embedded(mesh, _) => mesh.communicated_ns(),
            Engine::Remote(r) => r.communicated_ns(),
        })
    }

    /// Where the time of functions went since the program of this stage was put on these devices: what each step took, and
    /// what the devices could do at the most, which is measured now, in about a tenth of a second.
    ///
    /// # Errors
    /// A session that is lost.
    pub fn profile(&mut self) -> Result<Profile, Failure> {
        let devices = match &mut self.engine {
            Engine::Embedded(mesh, _) => mesh.profile(),
            Engine::Remote(r) => r.profile(self.plan.mesh.size())?,
        };
        Profile::new(&self.plan, &self.clocks, devices)
    }

    /// How long the steps of each device of this process took so far; empty for devices of other processes.
    pub(crate) fn times(&self) -> Vec<Vec<FunctionTimes>> {
        match &self.engine {
            Engine::Embedded(mesh, _) => mesh.times(),
            Engine::Remote(_) => vec![],
        }
    }
}

/// Puts pieces where `set` says, on every device that holds them.
fn put(
    mesh: &DeviceGroup,
    pieces: impl Iterator<Item = Result<Piece, Failure>>,
    set: impl Fn(&mut Device, &Array),
) -> Result<(), Failure> {
    for piece in pieces {
        let Piece { devices, array, .. } = piece?;
        devices.into_iter().for_each(|d| set(&mut mesh.device(d), &array));
    }
    Ok(())
}

/// Whether what each device would need is within its budget.
fn fits(needs: impl Iterator<Item = (usize, Option<usize>)>) -> Result<(), Failure> {
    let over = needs.enumerate().filter_map(|(device, (needed, budget))| Some((needed, device, budget?)));
    match over.filter(|(needed, _, budget)| needed > budget).max() {
        Some((needed, device, budget)) => Err(over_both(device, needed, budget).into()),
        None => Ok(()),
    }
}

/// The stage that a program begins in, and its program.
fn first_stage(whole: &Program) -> Result<(Name, Program), Failure> {
    match whole.stages.first() {
        Some((name, _)) => Ok((name.clone(), whole.stage(name)?)),
        None => Ok(("".into(), whole.clone())),
    }
}

fn no_place() -> Failure {
    Failure::Checkpoint("C0005: this session has no place for checkpoints; give it one (`Options::checkpoints`)".into())
}
