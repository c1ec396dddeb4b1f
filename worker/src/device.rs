//! A device: an arena, a group of threads, and the prepared steps of every function.
//!
//! A step's kernel and the addresses of its operands are worked out when the plan is loaded. The step loop walks a
//! list: nothing is allocated, planned or looked up by name in it.

use crate::arena::Arena;
use crate::kernels::isa::{Isa, UnknownIsa};
use crate::kernels::kernel::{Kernel, Operands};
use crate::kernels::vm::StepContext;
use crate::pool::{Cores, Pool, WORKSPACE_BYTES};
use crate::recorder::Recorder;
use crate::transport::{Transport, TransportError};
use crate::watch::{Computed, Looked, NonFinite, Odd, Origin, scan};
use mesh::array::Array;
use mesh::dim::Name;
use mesh::error::Place;
use mesh::plan::{ALIGN, Buffer, DevicePlan, Part, ProgramPlan};
use mesh::program::Program;
use ndarray::{ArrayViewMutD, IxDyn, SliceInfoElem};
use std::sync::Arc;

/// A step, ready to run.
struct Step {
    kernel: Kernel,
    inputs: Vec<*const u8>,
    outputs: Vec<*mut u8>,
    output_bytes: usize,
    scratch: *mut u8,
    /// End of the last buffer that it touches.
    end: usize,
    label: Name,
    /// Whether something is under way behind it.
    leads_on: bool,
    /// What of it is looked through, and where it stands in the user's source.
    looked: Looked,
    place: Place,
}

/// A function, ready to run.
struct Function {
    steps: Vec<Step>,
    inputs: Vec<(Name, Part, Buffer)>,
    outputs: Vec<(Name, Part, Buffer)>,
}

/// What a device is made from.
pub struct Seat {
    /// Its number in the mesh.
    pub device: usize,
    /// Its memory, as large as its plan says.
    pub arena: Arc<Arena>,
    /// Its end of the transport.
    pub end: Box<dyn Transport>,
    /// Where its threads are pinned to.
    pub cores: Option<Cores>,
    /// What its kernels are compiled for.
    pub isa: Isa,
}

/// A device.
pub struct Device {
    pool: Pool,
    arena: Arc<Arena>,
    transport: Box<dyn Transport>,
    variables: Vec<(Part, Buffer)>,
    functions: Vec<(Name, Function)>,
    seed: u64,
    /// End of the last byte of the arena that steps have touched so far.
    touched: usize,
    recorder: Arc<Recorder>,
    /// Its number in the mesh.
    number: usize,
    /// What was not finite, if it is watched for.
    watched: Option<Watched>,
    /// What its plan says that it takes, and the most until it took the place of another.
    planned: usize,
    earlier: Peak,
}

/// A device's memory in bytes, at the most so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peak {
    /// By the plans.
    pub predicted: usize,
    /// What was in use.
    pub measured: usize,
}

/// What a device watches for.
struct Watched {
    /// By variable: whether it is a weight.
    weights: Vec<bool>,
    found: Vec<NonFinite>,
}

// SAFETY: the addresses in the steps lie in the arena, which the device keeps alive.
unsafe impl Send for Device {}

/// What a device cannot do.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not enough memory.
    #[error(
        "W0003: the machine has no {bytes} bytes for device {device}; use a smaller model or volume, or more machines"
    )]
    Memory {
        /// The device.
        device: usize,
        /// What its plan needs.
        bytes: usize,
    },
    /// Something between devices.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An instruction set that there is not.
    #[error(transparent)]
    Isa(#[from] UnknownIsa),
}

impl Device {
    /// Memory for device `index` of a plan; `new` is [`Arena::private`] or [`Arena::shared`].
    ///
    /// # Errors
    /// A machine that does not have it.
    pub fn arena(plan: &ProgramPlan, index: usize, new: fn(usize) -> Option<Arena>) -> Result<Arc<Arena>, DeviceError> {
        let bytes = plan.arena_bytes(index);
        new(bytes).map(Arc::new).ok_or(DeviceError::Memory { device: index, bytes })
    }

    /// Loads device `index` of a plan into `arena`, which is as large as the plan says.
    pub fn new(
        plan: &ProgramPlan,
        Seat { device: index, arena, end: transport, cores, isa }: Seat,
        threads: usize,
        seed: u64,
    ) -> Device {
        let functions: Vec<(Name, Function)> =
            plan.functions.iter().map(|(n, f)| (n.clone(), prepare(&arena, &f[index], isa))).collect();
        let op = |s: &Step| (s.label.clone(), s.kernel.communicates());
        let ops = |f: &Function| f.steps.iter().map(op).collect();
        let recorder = Arc::new(Recorder::new(functions.iter().map(|(n, f)| (n.clone(), ops(f)))));
        let variables = plan.variables[index].clone();
        let touched = variables.iter().map(|(_, b)| b.offset + b.bytes).max().unwrap_or(0);
        let pool = Pool::new(threads, cores);
        Device {
            pool,
            arena,
            transport,
            variables,
            functions,
            seed,
            touched,
            recorder,
            number: index,
            watched: None,
            planned: plan.peak_bytes(index),
            earlier: Peak::default(),
        }
    }

    /// Index of a function, to run it by.
    pub fn function(&self, name: &str) -> Option<usize> {
        self.functions.iter().position(|(n, _)| **n == *name)
    }

    /// Runs a function as step `step`.
    ///
    /// # Errors
    /// A transport that fails; every other device is told.
    pub fn run(&mut self, function: usize, step: u32) -> Result<(), DeviceError> {
        let cx = StepContext::new(self.seed, step);
        if self.watched.is_some() {
            self.watch_variables();
        }
        let mut recording = self.recorder.run(function, step, self.transport.waited_ns());
        for (index, s) in self.functions[function].1.steps.iter().enumerate() {
            let operands =
                Operands { inputs: &s.inputs, outputs: &s.outputs, output_bytes: s.output_bytes, scratch: s.scratch };
            recording.begin(index);
            // A step may write over what it reads.
            let finite = self.watched.as_ref().map(|_| finite(s));
            // SAFETY: the addresses are the plan's buffers, which overlap only as the plan allows.
            let done = unsafe { s.kernel.run(&self.pool, &mut *self.transport, &operands, cx) };
            if let Err(e) = done {
                self.transport.abort(&format!("{}: {e}", s.label));
                return Err(e.into());
            }
            // What is under way moves on, if it needs the device for that.
            if s.leads_on
                && let Err(e) = self.transport.progress()
            {
                self.transport.abort(&format!("{}: {e}", s.label));
                return Err(e.into());
            }
            recording.end(index, self.transport.waited_ns());
            if let (Some(Watched { found, .. }), Some(finite)) = (&mut self.watched, finite) {
                watch_step(found, index, s, self.number, &finite);
            }
            self.touched = self.touched.max(s.end);
        }
        Ok(())
    }

    /// Watches for values that are not finite from now on, in a plan of that program, or no more; what was seen so far is
    /// forgotten.
    pub fn watch(&mut self, program: Option<&Program>) {
        let weights = |p: &Program| p.variables.iter().map(|v| v.trainable).collect();
        self.watched = program.map(|p| Watched { weights: weights(p), found: vec![] });
    }

    /// The first values seen that are not finite: those infinite, and those that are no numbers.
    pub fn non_finite(&self) -> &[NonFinite] {
        self.watched.as_ref().map_or(&[], |w| &w.found)
    }

    fn watch_variables(&mut self) {
        let Some(Watched { weights, found }) = &mut self.watched else { return };
        for (v, (part, buffer)) in self.variables.iter().enumerate() {
            let (dtype, elements) = (part.ty.dtype, part.region.elements());
            // SAFETY: the buffer is this part's and no step runs now.
            let scan = unsafe { scan(dtype, self.arena.at(*buffer), elements) };
            // The start of a running maximum is infinite, a weight never.
            let weight = weights.get(v).copied().unwrap_or(false);
            for (nan, odd) in scan.odd().filter(|(nan, _)| *nan || weight) {
                let (count, kind) = (odd.count, kind(nan));
                let text = format!("{count} of {elements} values of {} on device {} are {kind}", part.ty, self.number);
                NonFinite { origin: Origin::Variable(v), device: self.number, nan, text }.keep_first(found);
            }
        }
    }

    /// Tells every other device that this one has failed.
    pub fn abort(&mut self, reason: &str) {
        self.transport.abort(reason);
    }

    /// What the device did last; whoever has this reads it while a step runs.
    pub fn recorder(&self) -> Arc<Recorder> {
        self.recorder.clone()
    }

    /// Its memory so far at the most, with that of the devices whose place it took: in use is the arena up to the last
    /// byte that a step touched, and the workspaces of the threads.
    pub fn peak(&self) -> Peak {
        debug_assert!(self.arena.guarded(), "a kernel wrote behind the arena");
        let used = self.touched.next_multiple_of(ALIGN) + self.pool.threads() * WORKSPACE_BYTES;
        Peak { predicted: self.planned.max(self.earlier.predicted), measured: used.max(self.earlier.measured) }
    }

    /// Bytes that it has taken from the machine.
    fn taken(&self) -> usize {
        self.arena.bytes() + self.pool.threads() * WORKSPACE_BYTES
    }

    /// Takes the place of a device that runs another plan: variables, by pairs of indices here and there, get their values
    /// there. While both are there, all that either has taken counts as in use.
    pub fn succeed(&mut self, before: &Device, pairs: &[(usize, usize)]) {
        for (here, there) in pairs {
            let ((part, to), (_, from)) = (&self.variables[*here], &before.variables[*there]);
            let bytes = part.region.elements() * part.ty.dtype.bytes();
            assert!(bytes <= to.bytes && bytes <= from.bytes, "a part that is larger than its buffer");
            // SAFETY: the buffers are these parts', in two arenas, and no step runs on either device now.
            unsafe { std::ptr::copy_nonoverlapping(before.arena.at(*from), self.arena.at(*to), bytes) };
        }
        let peak = before.peak();
        self.earlier = Peak {
            predicted: peak.predicted.max(before.planned + self.planned),
            measured: peak.measured.max(before.taken() + self.taken()),
        };
    }

    /// Sets what this device holds of feed `index`.
    pub fn feed(&mut self, function: usize, index: usize, array: &Array) {
        let (_, part, buffer) = &self.functions[function].1.inputs[index];
        self.touched = self.touched.max(buffer.offset + buffer.bytes);
        self.write(part, *buffer, array);
    }

    /// Copies what this device holds of fetch `index` into the whole array, or into an array of just that.
    pub fn fetch(&self, function: usize, index: usize, array: &mut Array) {
        let (_, part, buffer) = &self.functions[function].1.outputs[index];
        self.read(part, *buffer, array);
    }

    /// Sets what this device holds of a variable.
    pub fn set_variable(&mut self, index: usize, array: &Array) {
        let (part, buffer) = &self.variables[index];
        self.write(part, *buffer, array);
    }

    /// Copies what this device holds of a variable into the whole array, or into an array of just that.
    pub fn variable(&self, index: usize, array: &mut Array) {
        let (part, buffer) = &self.variables[index];
        self.read(part, *buffer, array);
    }

    /// The bytes of what this device holds of a variable, row-major.
    pub fn variable_bytes(&self, index: usize) -> bytes::Bytes {
        let (part, buffer) = &self.variables[index];
        let bytes = part.region.elements() * part.ty.dtype.bytes();
        assert!(bytes <= buffer.bytes, "a part that is larger than its buffer");
        // SAFETY: the buffer is this part's and no step runs now.
        bytes::Bytes::copy_from_slice(unsafe { std::slice::from_raw_parts(self.arena.at(*buffer), bytes) })
    }

    /// Sets what this device holds of a variable from such bytes.
    pub fn set_variable_bytes(&mut self, index: usize, bytes: &[u8]) {
        let (part, buffer) = &self.variables[index];
        assert_eq!(bytes.len(), part.region.elements() * part.ty.dtype.bytes(), "bytes of another part");
        assert!(bytes.len() <= buffer.bytes, "a part that is larger than its buffer");
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.arena.at(*buffer), bytes.len()) };
    }

    fn write(&self, part: &Part, buffer: Buffer, array: &Array) {
        assert_eq!((array.dtype(), array.shape()), (part.ty.dtype, &*part.region.shape()), "an array of another part");
        if part.region.is_empty() {
            return;
        }
        let to = self.arena.at(buffer);
        // SAFETY: the buffer is this part's and no step runs now.
        unsafe {
            match array {
                Array::F32(a) => held::<f32>(part, to).assign(a),
                Array::I32(a) => held::<i32>(part, to).assign(a),
                Array::Bool(a) => held::<u8>(part, to).assign(&a.mapv(u8::from)),
            }
        }
    }

    /// The array is the whole tensor or just the part.
    fn read(&self, part: &Part, buffer: Buffer, array: &mut Array) {
        if part.region.is_empty() {
            return;
        }
        let (from, at) = (self.arena.at(buffer), place(part, array));
        // SAFETY: the buffer is this part's and no step runs now.
        unsafe {
            match array {
                Array::F32(a) => a.slice_mut(at.as_slice()).assign(&held::<f32>(part, from)),
                Array::I32(a) => a.slice_mut(at.as_slice()).assign(&held::<i32>(part, from)),
                Array::Bool(a) => a.slice_mut(at.as_slice()).assign(&held::<u8>(part, from).mapv(|b| b != 0)),
            }
        }
    }
}

/// By operand of a step that is about to run: whether all of it is finite.
fn finite(s: &Step) -> Vec<bool> {
    let operands = s.looked.operands.iter().zip(&s.inputs);
    // SAFETY: an operand's buffer holds as many elements, and no step runs now.
    operands.map(|((dtype, elements), input)| unsafe { scan(*dtype, *input, *elements) }.finite()).collect()
}

/// Notes what a step has written that is no number, and what is infinite by no operand that was infinite before;
/// `finite` says which were not.
fn watch_step(found: &mut Vec<NonFinite>, index: usize, s: &Step, device: usize, finite: &[bool]) {
    for (Computed { dtype, elements, infinite_by }, output) in s.looked.results.iter().zip(&s.outputs) {
        let of_finite = infinite_by.as_ref().is_some_and(|by| by.iter().all(|operand| finite[*operand]));
        // SAFETY: the output's buffer holds as many elements, and the step has ended.
        let scan = unsafe { scan(*dtype, *output, *elements) };
        for (nan, Odd { count, first }) in scan.odd().filter(|(nan, _)| *nan || of_finite) {
            let text = format!(
                "`{}` ({}): {count} of {elements} values on device {device}, the first at {first}, are {}",
                s.label,
                s.place,
                kind(nan)
            );
            NonFinite { origin: Origin::Step(index), device, nan, text }.keep_first(found);
        }
    }
}

fn kind(nan: bool) -> &'static str {
    if nan { "no number" } else { "infinite" }
}

/// Where a part lies in an array that holds the whole tensor, or the part alone.
fn place(part: &Part, array: &Array) -> Vec<SliceInfoElem> {
    let alone = array.shape() == part.region.shape();
    part.region.0.iter().map(|(_, r)| SliceInfoElem::from(if alone { 0..r.len() } else { r.start..r.end })).collect()
}

/// The memory of a part as an array.
///
/// # Safety
/// The part's elements lie at `memory`, and nobody else touches them while the array is in use.
unsafe fn held<'a, T>(part: &Part, memory: *mut u8) -> ArrayViewMutD<'a, T> {
    // SAFETY: by this function's contract; buffers are aligned to more than any element.
    unsafe { ArrayViewMutD::from_shape_ptr(IxDyn(&part.region.shape()), memory.cast()) }
}

fn prepare(arena: &Arena, plan: &DevicePlan, isa: Isa) -> Function {
    let mut under_way = 0usize;
    let steps = plan.steps.iter().map(|s| {
        under_way += usize::from(s.work.begins());
        under_way -= usize::from(s.work.under_way().is_some() && s.work.ends());
        let buffers = s.inputs.iter().chain(&s.outputs).chain([&s.scratch]);
        Step {
            kernel: Kernel::with_isa(&s.work, isa),
            inputs: s.inputs.iter().map(|b| arena.at(*b).cast_const()).collect(),
            outputs: s.outputs.iter().map(|b| arena.at(*b)).collect(),
            output_bytes: s.outputs.first().map_or(0, |b| b.bytes),
            scratch: arena.at(s.scratch),
            end: buffers.map(|b| b.offset + b.bytes).max().unwrap_or(0),
            leads_on: under_way > 0,
            label: format!("{} {}", s.label.op, s.label.scope).trim_end().into(),
            looked: Looked::of(s),
            place: s.label.place,
        }
    });
    Function { steps: steps.collect(), inputs: plan.inputs.clone(), outputs: plan.outputs.clone() }
}
