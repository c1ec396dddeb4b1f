//! The kernel of a step: which of the kernels here does a piece of work, prepared once and run every step.

use super::band::BandPlan;
use super::contract::ContractPlan;
use super::conv::ConvPlan;
use super::copy::CopiesPlan;
use super::gather::GatherPlan;
use super::isa::Isa;
use super::join::JoinPlan;
use super::map::MapPlan;
use super::max_pool::MaxPoolPlan;
use super::reduce::ReducePlan;
use super::rows::RowsPlan;
use super::scatter_add::ScatterAddPlan;
use super::top_k::TopKPlan;
use super::vm::StepContext;
use super::weight_grad::WeightGradPlan;
use crate::collective::{AllReducePlan, ExchangePlan};
use crate::pool::{Pool, WORKSPACE_BYTES};
use crate::transport::{Transport, TransportError};
use mesh::plan::{Backend, Begun, Work};

/// A prepared piece of work.
pub enum Kernel {
    /// Fused elementwise loop.
    Map(MapPlan),
    /// Fused reduction.
    Reduce(ReducePlan),
    /// Convolution, forward or transposed.
    Conv(Box<ConvPlan>),
    /// Gradient of a convolution's weights.
    WeightGrad(Box<WeightGradPlan>),
    /// Sum of products.
    Contract(Box<ContractPlan>),
    /// Max pooling or its gradient.
    MaxPool(MaxPoolPlan),
    /// Windows' sums, resizing, and their adjoints.
    Rows(RowsPlan),
    /// Elements of a table by index.
    Gather(GatherPlan),
    /// Sums by index.
    ScatterAdd(Box<ScatterAddPlan>),
    /// Indices of the largest elements.
    TopK(TopKPlan),
    /// Copies within the device.
    Copies(CopiesPlan),
    /// Steps done slice by slice.
    Band(BandPlan),
    /// Boxes between devices.
    Exchange(ExchangePlan),
    /// A sum that several devices hold parts of.
    AllReduce(AllReducePlan),
    /// A sum that the device has made in parts.
    Join(JoinPlan),
    /// The combination of a sum that was begun.
    Combine(AllReducePlan),
    /// The end of what was begun.
    FinishExchange(ExchangePlan),
    /// The same of a sum.
    FinishAllReduce(AllReducePlan),
}

/// Where a step's operands lie.
pub struct Operands<'a> {
    /// Inputs, in the work's order.
    pub inputs: &'a [*const u8],
    /// Results.
    pub outputs: &'a [*mut u8],
    /// Bytes of the first result's buffer.
    pub output_bytes: usize,
    /// Room for intermediate results.
    pub scratch: *mut u8,
}

impl Kernel {
    /// Prepares a piece of work for the best instruction set.
    pub fn new(work: &Work) -> Kernel {
        Kernel::with_isa(work, Isa::detect())
    }

    /// Prepares a piece of work for one instruction set.
    pub fn with_isa(work: &Work, isa: Isa) -> Kernel {
        match work {
            Work::Map(nest) => Kernel::Map(MapPlan::with_isa(nest, isa)),
            Work::Reduce(r) => Kernel::Reduce(ReducePlan::with_isa(r, isa)),
            Work::Copy(c) => Kernel::Copies(CopiesPlan::new(c)),
            Work::Band(b) => Kernel::Band(BandPlan::with_isa(b, isa)),
            Work::Exchange(e) => Kernel::Exchange(ExchangePlan::new(e)),
            Work::AllReduce(a) => Kernel::AllReduce(AllReducePlan::new(a)),
            Work::Join(j) => Kernel::Join(JoinPlan::new(j)),
            Work::Combine(a) => Kernel::Combine(AllReducePlan::new(a)),
            Work::Finish(Begun::Exchange(e)) => Kernel::FinishExchange(ExchangePlan::new(e)),
            Work::Finish(Begun::AllReduce(a)) => Kernel::FinishAllReduce(AllReducePlan::new(a)),
            Work::Op(op) => ConvPlan::with_isa(op, isa)
                .map(|p| Kernel::Conv(Box::new(p)))
                .or_else(|| WeightGradPlan::with_isa(op, isa).map(|p| Kernel::WeightGrad(Box::new(p))))
                .or_else(|| ContractPlan::with_isa(op, isa).map(|p| Kernel::Contract(Box::new(p))))
                .or_else(|| MaxPoolPlan::with_isa(op, isa).map(Kernel::MaxPool))
                .or_else(|| RowsPlan::with_isa(op, isa).map(Kernel::Rows))
                .or_else(|| GatherPlan::new(op).map(Kernel::Gather))
                .or_else(|| ScatterAddPlan::new(op).map(|p| Kernel::ScatterAdd(Box::new(p))))
                .or_else(|| TopKPlan::new(op).map(Kernel::TopK))
                .unwrap_or_else(|| unreachable!("{} is planned as a loop, a copy or a kernel", op.op.op().name())),
        }
    }

    /// Whether it waits for other devices.
    pub fn communicates(&self) -> bool {
        matches!(
            self,
            Kernel::Exchange(_)
                | Kernel::AllReduce(_)
                | Kernel::Combine(_)
                | Kernel::FinishExchange(_)
                | Kernel::FinishAllReduce(_)
        )
    }

    /// Bytes of scratch that it needs with so many threads.
    pub fn scratch_bytes(&self, threads: usize) -> usize {
        match self {
            Kernel::Band(p) => p.scratch_bytes(threads),
            Kernel::Reduce(p) => p.scratch_bytes(),
            Kernel::Conv(p) => p.scratch_bytes(),
            Kernel::WeightGrad(p) => p.scratch_bytes(threads),
            Kernel::Contract(p) => p.scratch_bytes(),
            Kernel::ScatterAdd(p) => p.scratch_bytes(),
            Kernel::Map(_) | Kernel::MaxPool(_) | Kernel::Rows(_) | Kernel::Gather(_) | Kernel::TopK(_) => 0,
            Kernel::Copies(_) | Kernel::Join(_) => 0,
            // The planner works these out itself.
            Kernel::Exchange(_) | Kernel::AllReduce(_) | Kernel::Combine(_) => 0,
            Kernel::FinishExchange(_) | Kernel::FinishAllReduce(_) => 0,
        }
    }

    /// Runs it.
    ///
    /// # Safety
    /// Operands are buffers as large as the work says; they overlap only where the plan lets a map write in place.
    pub unsafe fn run(
        &self,
        pool: &Pool,
        transport: &mut dyn Transport,
        o: &Operands,
        cx: StepContext,
    ) -> Result<(), TransportError> {
        // The beginning of a sum writes none.
        let out = o.outputs.first().copied().unwrap_or(std::ptr::null_mut());
        // SAFETY: by this function's contract.
        unsafe {
            match self {
                Kernel::Exchange(p) => p.run(pool, transport, o.inputs[0], o.outputs[0], o.scratch),
                Kernel::AllReduce(p) => p.run(pool, transport, o.inputs[0], out, o.scratch),
                Kernel::Combine(p) => p.combine(pool, transport, o.inputs[0], o.outputs[0], o.scratch),
                Kernel::FinishExchange(p) => p.finish(pool, transport, o.outputs[0]),
                Kernel::FinishAllReduce(p) => p.finish(transport),
                _ => {
                    self.compute(pool, o, cx);
                    Ok(())
                }
            }
        }
    }

    /// Runs it, if it does not communicate.
    ///
    /// # Safety
    /// As for [`Kernel::run`].
    pub unsafe fn compute(&self, pool: &Pool, o: &Operands, cx: StepContext) {
        // What is done by other devices alone writes nothing here, nor reads.
        let out = o.outputs.first().copied().unwrap_or(std::ptr::null_mut());
        let (inputs, scratch) = (o.inputs, o.scratch);
        // SAFETY: by this function's contract.
        unsafe {
            match self {
                Kernel::Map(p) => p.run(pool, inputs, o.outputs, cx),
                Kernel::Reduce(p) => p.run(pool, inputs, o.outputs, scratch, cx),
                Kernel::Conv(p) => p.run(pool, o, cx),
                Kernel::WeightGrad(p) => p.run(pool, o),
                Kernel::Contract(p) => p.run(pool, o, cx),
                Kernel::MaxPool(p) => p.run(pool, inputs, out),
                Kernel::Rows(p) => p.run(pool, inputs[0], out),
                Kernel::Gather(p) => p.run(pool, inputs[0].cast(), inputs[1].cast(), out.cast()),
                Kernel::ScatterAdd(p) => p.run(pool, inputs[0], inputs[1].cast(), out, scratch.cast()),
                Kernel::TopK(p) => p.run(pool, inputs[0].cast(), out.cast()),
                Kernel::Copies(p) => p.run(pool, inputs, out, o.output_bytes),
                Kernel::Band(p) => p.run(pool, o, cx),
                Kernel::Join(p) => p.run(pool, inputs, out),
                Kernel::Exchange(_) | Kernel::AllReduce(_) | Kernel::Combine(_) => unreachable!("it needs a transport"),
                Kernel::FinishExchange(_) | Kernel::FinishAllReduce(_) => unreachable!("it needs a transport"),
            }
        }
    }
}

/// The CPU backend: what the planner needs to know of these kernels.
#[derive(Clone, Copy, Debug)]
pub struct CpuBackend {
    /// Threads of each device.
    pub threads: usize,
}

impl Backend for CpuBackend {
    fn scratch_bytes(&self, work: &Work) -> usize {
        match work {
            // Without preparing them, which takes as long as there are rows: a plan is made for every device, and asks of all.
            Work::Map(_) | Work::Copy(_) | Work::Join(_) => 0,
            Work::Op(op) => ContractPlan::scratch_of(op, Isa::detect())
                .unwrap_or_else(|| Kernel::new(work).scratch_bytes(self.threads)),
            _ => Kernel::new(work).scratch_bytes(self.threads),
        }
    }
    fn workspace_bytes(&self) -> usize {
        self.threads * WORKSPACE_BYTES
    }
    fn threads(&self) -> usize {
        self.threads
    }
}
