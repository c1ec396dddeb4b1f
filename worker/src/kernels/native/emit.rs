//! Machine code for a tape: a loop over rows and one over the lanes of a row, sixteen at a time, that keep everything
//! between inputs and results in AVX-512 registers.
//!
//! `entry(table, columns, constants, rows)`: the table has where each input and then where each result begins, and behind
//! that how many bytes the next row of each lies further on. What is the same along a row is computed once for it, and
//! stays in registers as far as there are some. Lanes that are left over after the last sixteen are done by the same code under a mask. Results are stored after everything is
//! loaded, so that one may lie where an input lies.

use super::tape::{One, Op, Test, Two, Value};
use iced_x86::code_asm::{CodeAssembler, CodeLabel, *};
use iced_x86::{Code as Opcode, IcedError, Instruction, MemoryOperand, Register};
use memmap2::{Mmap, MmapMut};

/// How the elements of an input or a result lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32 bits each.
    Lanes,
    /// The upper 16 bits.
    Bf16,
    /// As that, rounded when it is stored.
    ToBf16,
    /// A byte.
    Byte,
    /// One element of 32 bits for a row.
    Splat,
    /// One `bf16`.
    SplatBf16,
    /// An `f16` each, rounded when it is stored.
    F16,
    /// One `f16`.
    SplatF16,
    /// Sixteen elements of 32 bits for a row, the same for each sixteen lanes.
    Repeated,
}

impl Format {
    /// Whether a row has an element a lane.
    fn of_lanes(self) -> bool {
        !matches!(self, Format::Splat | Format::SplatBf16 | Format::SplatF16 | Format::Repeated)
    }
}

/// A loop to compile.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// What is done to a lane.
    pub ops: Vec<Op>,
    /// The inputs.
    pub inputs: Vec<Format>,
    /// The results, each of lanes: which value, and how it is stored.
    pub results: Vec<(Value, Format)>,
    /// From sixteen lanes to the next ones of a row.
    pub step: usize,
}

/// A compiled loop.
pub struct Code {
    memory: Mmap,
    constants: Vec<u32>,
    /// Inputs and results.
    entries: usize,
}

/// As functions are called on Unix.
type Entry = unsafe extern "C" fn(table: *mut usize, columns: usize, constants: *const u32, rows: usize);

impl Code {
    /// Runs it over rows.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL, and BF16 if the tape rounds by its instruction. The table has a pointer for every input to its elements and for every
    /// result to room for them, as their formats say, and as many distances of rows; a result overlaps an input only where both
    /// have elements of one size that lie at the same places. It is changed.
    pub unsafe fn run(&self, table: &mut [usize], [rows, columns]: [usize; 2]) {
        debug_assert!(rows > 0 && table.len() == 2 * self.entries);
        // SAFETY: the memory holds a function of this signature, made by `compile`, and may be executed; it touches what
        // the caller vouches for, the constants and its stack alone.
        unsafe {
            let entry = std::mem::transmute::<*const u8, Entry>(self.memory.as_ptr());
            entry(table.as_mut_ptr(), columns, self.constants.as_ptr(), rows);
        }
    }
}

/// Compiles a loop; None on other systems, where memory cannot be made executable, and of more than [`RESULTS`].
pub fn compile(source: &Source) -> Option<Code> {
    if !cfg!(all(target_arch = "x86_64", unix)) || source.results.len() > RESULTS {
        return None;
    }
    let (source, of_rows) = rows_first(source);
    let mut emitter = Emitter::new(&source);
    let code = emitter.function(of_rows).ok()?;
    let mut memory = MmapMut::map_anon(code.len()).ok()?;
    memory.copy_from_slice(&code);
    let entries = source.inputs.len() + source.results.len();
    Some(Code { memory: memory.make_exec().ok()?, constants: emitter.constants, entries })
}

/// The loop with what is the same along a row in front, and how many operations that are.
fn rows_first(source: &Source) -> (Source, usize) {
    let mut same: Vec<bool> = Vec::with_capacity(source.ops.len());
    for op in &source.ops {
        same.push(match op {
            Op::Input(i) => !source.inputs[*i].of_lanes(),
            _ => arguments(op).into_iter().all(|a| same[a]),
        });
    }
    let mut order: Vec<Value> = (0..same.len()).filter(|i| same[*i]).collect();
    let count = order.len();
    order.extend((0..same.len()).filter(|i| !same[*i]));
    let mut place = vec![0; order.len()];
    order.iter().enumerate().for_each(|(at, v)| place[*v] = at);
    let at = |v: Value| place[v];
    let moved = |v: &Value| match source.ops[*v] {
        Op::One(f, a) => Op::One(f, at(a)),
        Op::Two(f, a, b) => Op::Two(f, at(a), at(b)),
        Op::TimesPlus(values) => Op::TimesPlus(values.map(at)),
        Op::Choose(test, values) => Op::Choose(test, values.map(at)),
        leaf => leaf,
    };
    let ops = order.iter().map(moved).collect();
    let results = source.results.iter().map(|(v, format)| (at(*v), *format)).collect();
    (Source { ops, inputs: source.inputs.clone(), results, ..*source }, count)
}

/// The most results.
const RESULTS: usize = 16;
/// Where the table and the constants are passed.
const TABLE: Register = Register::RDI;
const CONSTANTS: Register = Register::RDX;
/// The first lane of sixteen.
const LANE: Register = Register::RAX;
/// For pointers that have no register of their own.
const SCRATCH: AsmRegister64 = r11;
/// For the pointers of the first inputs and results.
const POINTERS: [AsmRegister64; 9] = [r8, r9, r10, rbx, rbp, r12, r13, r14, r15];
/// Registers that a function gives back as they were.
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];
/// The result of a test.
const TRUTH: Register = Register::K1;
/// The lanes that are left over.
const REST: Register = Register::K7;
/// The first sixteen lanes, as far as there are so many.
const FIRST: Register = Register::K6;
/// Bytes of a vector.
const VECTOR: usize = 64;
/// The last register is for values on their way to a store.
const REGISTERS: usize = 31;
/// Registers for what is the same along a row, at the most.
const OF_ROWS: usize = 14;
const LAST: Register = Register::ZMM31;
const LAST_HALF: Register = Register::YMM31;
/// Rounds floats to half a vector of `bf16`.
const ROUND: Opcode = Opcode::EVEX_Vcvtneps2bf16_ymm_k1z_zmmm512b32;
/// Rounds floats to half a vector of `f16`, and makes them wide.
const ROUND_F16: Opcode = Opcode::EVEX_Vcvtps2ph_ymmm256_k1z_zmm_imm8_sae;
const WIDEN_F16: Opcode = Opcode::EVEX_Vcvtph2ps_zmm_k1z_ymmm256_sae;
/// To the nearest, ties to even.
const NEAREST: u32 = 0;

struct Emitter<'a> {
    source: &'a Source,
    constants: Vec<u32>,
    /// Instructions, and whether each touches an element of every lane.
    body: Vec<(Instruction, bool)>,
    /// By value: where it is used, the last use first. Stores come after all operations.
    uses: Vec<Vec<usize>>,
    registers: [Option<Value>; REGISTERS],
    /// Values that stay in their registers for a whole row.
    of_rows: Vec<Value>,
    /// By value: its place on the stack.
    spilled: Vec<Option<usize>>,
    slots: usize,
}

fn zmm(register: usize) -> Register {
    Register::ZMM0 + register as u32
}

/// The lower half of a vector register.
fn half_of(register: Register) -> Register {
    Register::YMM0 + (register as u32 - Register::ZMM0 as u32)
}

fn code_of(f: Two) -> Opcode {
    match f {
        Two::Add => Opcode::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er,
        Two::Sub => Opcode::EVEX_Vsubps_zmm_k1z_zmm_zmmm512b32_er,
        Two::Mul => Opcode::EVEX_Vmulps_zmm_k1z_zmm_zmmm512b32_er,
        Two::Div => Opcode::EVEX_Vdivps_zmm_k1z_zmm_zmmm512b32_er,
        Two::Lesser => Opcode::EVEX_Vminps_zmm_k1z_zmm_zmmm512b32_sae,
        Two::Greater => Opcode::EVEX_Vmaxps_zmm_k1z_zmm_zmmm512b32_sae,
        Two::Scaled => Opcode::EVEX_Vscalefps_zmm_k1z_zmm_zmmm512b32_er,
        Two::And => Opcode::EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32,
        Two::Or => Opcode::EVEX_Vpord_zmm_k1z_zmm_zmmm512b32,
        Two::Xor => Opcode::EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32,
        Two::Plus => Opcode::EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32,
        Two::Minus => Opcode::EVEX_Vpsubd_zmm_k1z_zmm_zmmm512b32,
        Two::Times => Opcode::EVEX_Vpmulld_zmm_k1z_zmm_zmmm512b32,
        Two::Largest => Opcode::EVEX_Vpmaxsd_zmm_k1z_zmm_zmmm512b32,
        Two::Smallest => Opcode::EVEX_Vpminsd_zmm_k1z_zmm_zmmm512b32,
    }
}

fn commutes(f: Two) -> bool {
    !matches!(f, Two::Sub | Two::Div | Two::Minus | Two::Lesser | Two::Greater | Two::Scaled)
}

/// The instruction for a test and its predicate; NaNs raise nothing.
fn test_of(test: Test) -> (Opcode, u32) {
    let floats = Opcode::EVEX_Vcmpps_kr_k1_zmm_zmmm512b32_imm8_sae;
    let integers = Opcode::EVEX_Vpcmpd_kr_k1_zmm_zmmm512b32_imm8;
    match test {
        Test::Equals => (floats, 0),
        Test::Differs => (floats, 4),
        Test::Less => (floats, 17),
        Test::AtMost => (floats, 18),
        Test::Nan => (floats, 3),
        Test::Same => (integers, 0),
        Test::Other => (integers, 4),
        Test::Below => (integers, 1),
        Test::NotAbove => (integers, 2),
    }
}

/// An operand that an instruction reads last.
enum Operand {
    Register(Register),
    Memory(MemoryOperand),
}

impl<'a> Emitter<'a> {
    fn new(source: &'a Source) -> Emitter<'a> {
        let n = source.ops.len();
        let mut uses = vec![Vec::new(); n];
        let stores = source.results.iter().map(|(v, _)| *v).enumerate();
        stores.for_each(|(r, v)| uses[v].push(n + r));
        for (i, op) in source.ops.iter().enumerate() {
            arguments(op).into_iter().for_each(|a| uses[a].push(i));
        }
        uses.iter_mut().for_each(|u| u.sort_unstable_by(|a, b| b.cmp(a)));
        Emitter {
            source,
            constants: Vec::new(),
            body: Vec::new(),
            uses,
            registers: [None; REGISTERS],
            of_rows: Vec::new(),
            spilled: vec![None; n],
            slots: 0,
        }
    }

    /// The bytes of the function. The first operations are done once a row.
    fn function(&mut self, of_rows: usize) -> Result<Vec<u8>, IcedError> {
        self.operations(0..of_rows)?;
        // What a row's lanes need of that stays, or waits on the stack. Single elements are spread as they are read.
        let whole = |op: &Op| match op {
            Op::Input(i) => self.source.inputs[*i] == Format::Repeated,
            Op::Constant(_) => false,
            _ => true,
        };
        let needed = (0..of_rows).filter(|v| whole(&self.source.ops[*v]) && !self.uses[*v].is_empty());
        let stays: Vec<Value> = needed.take(OF_ROWS).collect();
        for register in 0..REGISTERS {
            if let Some(v) = self.registers[register].filter(|v| !stays.contains(v)) {
                self.spill(v, register)?;
                self.registers[register] = None;
            }
        }
        for v in &stays {
            self.fetch(*v, of_rows, &stays)?;
        }
        self.of_rows = stays;
        let each_row = std::mem::take(&mut self.body);
        self.operations(of_rows..self.source.ops.len())?;
        self.stores()?;
        let entries = self.source.inputs.len() + self.source.results.len();
        let mut a = CodeAssembler::new(64)?;
        for register in SAVED {
            a.push(register)?;
        }
        // The stack's slots lie at whole vectors; behind them is where the stack was, and how many rows are to come.
        let room = (self.slots * VECTOR) as i32;
        a.mov(SCRATCH, rsp)?;
        a.sub(rsp, room + VECTOR as i32)?;
        a.and(rsp, -(VECTOR as i32))?;
        a.mov(qword_ptr(rsp + room), SCRATCH)?;
        a.mov(qword_ptr(rsp + (room + 8)), rcx)?;
        for (i, pointer) in POINTERS.into_iter().enumerate().take(entries) {
            a.mov(pointer, qword_ptr(rdi + 8 * i))?;
        }
        a.mov(ecx, esi)?;
        a.and(ecx, 15)?;
        a.mov(eax, -1)?;
        a.bzhi(eax, eax, ecx)?;
        a.kmovw(k7, eax)?;
        a.mov(ecx, 16)?;
        a.cmp(esi, ecx)?;
        a.cmovb(ecx, esi)?;
        a.mov(eax, -1)?;
        a.bzhi(eax, eax, ecx)?;
        a.kmovw(k6, eax)?;
        a.mov(rcx, rsi)?;
        a.and(rcx, -16)?;
        let (mut row, mut again, mut rest, mut done): (CodeLabel, CodeLabel, CodeLabel, CodeLabel) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut row)?;
        for (instruction, _) in &each_row {
            a.add_instruction(*instruction)?;
        }
        a.xor(eax, eax)?;
        a.test(rcx, rcx)?;
        a.jz(rest)?;
        a.set_label(&mut again)?;
        for (instruction, _) in &self.body {
            a.add_instruction(*instruction)?;
        }
        a.add(rax, self.source.step as i32)?;
        a.cmp(rax, rcx)?;
        a.jb(again)?;
        a.set_label(&mut rest)?;
        a.cmp(rax, rsi)?;
        a.jae(done)?;
        for (instruction, of_lanes) in &self.body {
            a.add_instruction(if *of_lanes { masked(*instruction) } else { *instruction })?;
        }
        a.set_label(&mut done)?;
        for i in 0..entries {
            let further = qword_ptr(rdi + 8 * (entries + i));
            match POINTERS.get(i) {
                Some(pointer) => a.add(*pointer, further)?,
                None => {
                    a.mov(SCRATCH, further)?;
                    a.add(qword_ptr(rdi + 8 * i), SCRATCH)?;
                }
            }
        }
        a.dec(qword_ptr(rsp + (room + 8)))?;
        a.jnz(row)?;
        a.mov(rsp, qword_ptr(rsp + room))?;
        for register in SAVED.into_iter().rev() {
            a.pop(register)?;
        }
        a.vzeroupper()?;
        a.ret()?;
        a.assemble(0)
    }

    /// The instructions of some operations.
    fn operations(&mut self, range: std::ops::Range<usize>) -> Result<(), IcedError> {
        let source = self.source;
        for i in range {
            if self.uses[i].is_empty() {
                continue;
            }
            match source.ops[i] {
                // Loaded where they are used first.
                Op::Input(_) | Op::Constant(_) => {}
                Op::One(f, a) => {
                    let a = self.fetch(a, i, &[])?;
                    let to = self.result(i, i)?;
                    let one = |code| Instruction::with2(code, to, a);
                    let instruction = match f {
                        One::Sqrt => one(Opcode::EVEX_Vsqrtps_zmm_k1z_zmmm512b32_er)?,
                        One::FromInteger => one(Opcode::EVEX_Vcvtdq2ps_zmm_k1z_zmmm512b32_er)?,
                        One::ToInteger => one(Opcode::EVEX_Vcvttps2dq_zmm_k1z_zmmm512b32_sae)?,
                        One::ToF16 => {
                            let halves = half_of(to);
                            self.push(Instruction::with3(ROUND_F16, halves, a, NEAREST)?);
                            Instruction::with2(WIDEN_F16, to, halves)?
                        }
                        One::ToBf16 => {
                            let halves = half_of(to);
                            self.push(Instruction::with2(ROUND, halves, a)?);
                            self.push(Instruction::with2(Opcode::EVEX_Vpmovzxwd_zmm_k1z_ymmm256, to, halves)?);
                            Instruction::with3(Opcode::EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8, to, to, 16u32)?
                        }
                        One::Up(n) => {
                            Instruction::with3(Opcode::EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8, to, a, u32::from(n))?
                        }
                        One::Down(n) => {
                            Instruction::with3(Opcode::EVEX_Vpsrld_zmm_k1z_zmmm512b32_imm8, to, a, u32::from(n))?
                        }
                    };
                    self.push(instruction);
                }
                Op::Two(f, a, b) => {
                    let swap = commutes(f) && self.in_memory(a) && !self.in_memory(b);
                    let (a, b) = if swap { (b, a) } else { (a, b) };
                    let first = self.fetch(a, i, &[b])?;
                    let (second, of_lanes) = self.operand(b, i, &[a])?;
                    let to = self.result(i, i)?;
                    let code = code_of(f);
                    let instruction = match second {
                        Operand::Register(r) => Instruction::with3(code, to, first, r)?,
                        Operand::Memory(m) => Instruction::with3(code, to, first, m)?,
                    };
                    self.body.push((instruction, of_lanes));
                }
                Op::TimesPlus([a, b, c]) => self.times_plus(i, [a, b, c])?,
                Op::Choose(test, [a, b, x, y]) => {
                    let first = self.fetch(a, i, &[b, x, y])?;
                    let (second, of_lanes) = self.operand(b, i, &[a, x, y])?;
                    let (code, predicate) = test_of(test);
                    let instruction = match second {
                        Operand::Register(r) => Instruction::with4(code, TRUTH, first, r, predicate)?,
                        Operand::Memory(m) => Instruction::with4(code, TRUTH, first, m, predicate)?,
                    };
                    self.body.push((instruction, of_lanes));
                    let otherwise = self.fetch(y, i, &[a, b, x])?;
                    // Its mask is taken: no lanes from memory.
                    let chosen = match self.is_lanes(x) {
                        true => Operand::Register(self.fetch(x, i, &[a, b, y])?),
                        false => self.operand(x, i, &[a, b, y])?.0,
                    };
                    let to = self.result(i, i)?;
                    let code = Opcode::EVEX_Vblendmps_zmm_k1z_zmm_zmmm512b32;
                    let mut blend = match chosen {
                        Operand::Register(r) => Instruction::with3(code, to, otherwise, r)?,
                        Operand::Memory(m) => Instruction::with3(code, to, otherwise, m)?,
                    };
                    blend.set_op_mask(TRUTH);
                    self.push(blend);
                }
            }
        }
        Ok(())
    }

    /// Operation `i`: a * b + c. The instruction for it takes one of the three for its result, and one from memory.
    fn times_plus(&mut self, i: usize, [a, b, c]: [Value; 3]) -> Result<(), IcedError> {
        let (a, b) = if self.in_memory(a) && !self.in_memory(b) { (b, a) } else { (a, b) };
        let a_at = self.fetch(a, i, &[b, c])?;
        let (from, of_lanes, code, gone) = if self.in_memory(c) || !self.in_memory(b) && self.ends(a, i) {
            // a = b * a + c
            let b_at = self.fetch(b, i, &[a, c])?;
            let (c, of_lanes) = self.operand(c, i, &[a, b])?;
            ((b_at, c), of_lanes, Opcode::EVEX_Vfmadd213ps_zmm_k1z_zmm_zmmm512b32_er, a)
        } else {
            // c = a * b + c
            self.fetch(c, i, &[a, b])?;
            let (b, of_lanes) = self.operand(b, i, &[a, c])?;
            ((a_at, b), of_lanes, Opcode::EVEX_Vfmadd231ps_zmm_k1z_zmm_zmmm512b32_er, c)
        };
        let mut to = self.register_of(gone).expect("it was fetched");
        if !self.ends(gone, i) {
            let copy = self.free(i, &[a, b, c])?;
            let code = Opcode::EVEX_Vmovaps_zmm_k1z_zmmm512;
            self.push(Instruction::with2(code, zmm(copy), zmm(to))?);
            to = copy;
        }
        let instruction = match from.1 {
            Operand::Register(r) => Instruction::with3(code, zmm(to), from.0, r)?,
            Operand::Memory(m) => Instruction::with3(code, zmm(to), from.0, m)?,
        };
        self.body.push((instruction, of_lanes));
        self.ended(i);
        self.registers[to] = Some(i);
        Ok(())
    }

    /// Whether an operation uses a value for the last time.
    fn ends(&self, v: Value, at: usize) -> bool {
        self.uses[v].first().is_none_or(|last| *last <= at) && !self.of_rows.contains(&v)
    }

    /// The instructions that store the results. Everything is loaded before anything is stored.
    fn stores(&mut self) -> Result<(), IcedError> {
        let source = self.source;
        let n = source.ops.len();
        let values: Vec<Value> = source.results.iter().map(|(v, _)| *v).collect();
        for (r, (value, _)) in source.results.iter().enumerate() {
            self.fetch(*value, n + r, &values)?;
        }
        for (r, (value, format)) in source.results.iter().enumerate() {
            let from = self.fetch(*value, n + r, &[])?;
            let to = self.lanes_at(source.inputs.len() + r, *format)?;
            let instruction = match format {
                Format::F16 => Instruction::with3(ROUND_F16, to, from, NEAREST)?,
                Format::Lanes | Format::Splat | Format::SplatBf16 | Format::SplatF16 | Format::Repeated => {
                    Instruction::with2(Opcode::EVEX_Vmovups_zmmm512_k1z_zmm, to, from)?
                }
                Format::Bf16 => {
                    let code = Opcode::EVEX_Vpsrld_zmm_k1z_zmmm512b32_imm8;
                    self.push(Instruction::with3(code, LAST, from, 16u32)?);
                    Instruction::with2(Opcode::EVEX_Vpmovdw_ymmm256_k1z_zmm, to, LAST)?
                }
                Format::ToBf16 => {
                    self.push(Instruction::with2(ROUND, LAST_HALF, from)?);
                    Instruction::with2(Opcode::EVEX_Vmovdqu16_ymmm256_k1z_ymm, to, LAST_HALF)?
                }
                Format::Byte => Instruction::with2(Opcode::EVEX_Vpmovdb_xmmm128_k1z_zmm, to, from)?,
            };
            self.body.push((instruction, true));
            self.ended(n + r);
        }
        Ok(())
    }

    fn push(&mut self, instruction: Instruction) {
        self.body.push((instruction, false));
    }

    fn is_lanes(&self, v: Value) -> bool {
        matches!(self.source.ops[v], Op::Input(i) if self.source.inputs[i].of_lanes())
    }

    fn register_of(&self, v: Value) -> Option<usize> {
        self.registers.iter().position(|r| *r == Some(v))
    }

    /// Whether an instruction can read it from memory.
    fn in_memory(&self, v: Value) -> bool {
        let memory = match self.source.ops[v] {
            Op::Constant(_) => true,
            Op::Input(i) => match self.source.inputs[i] {
                Format::Splat => true,
                // Loaded once if it is used more than once.
                Format::Lanes => self.uses[v].len() == 1,
                Format::Bf16 | Format::ToBf16 | Format::Byte | Format::SplatBf16 => false,
                Format::F16 | Format::SplatF16 | Format::Repeated => false,
            },
            _ => self.spilled[v].is_some(),
        };
        memory && self.register_of(v).is_none()
    }

    /// A value as an operand that may lie in memory, and whether it is an element of every lane there.
    fn operand(&mut self, v: Value, at: usize, besides: &[Value]) -> Result<(Operand, bool), IcedError> {
        if !self.in_memory(v) {
            return Ok((Operand::Register(self.fetch(v, at, besides)?), false));
        }
        Ok(match self.source.ops[v] {
            Op::Input(i) if self.source.inputs[i] == Format::Lanes => {
                (Operand::Memory(self.lanes_at(i, Format::Lanes)?), true)
            }
            _ => (Operand::Memory(self.memory(v, true)?), false),
        })
    }

    /// Where a constant, a splat or a spilled value lies.
    fn memory(&mut self, v: Value, broadcast: bool) -> Result<MemoryOperand, IcedError> {
        let at = |base: Register, offset: usize, broadcast: bool| {
            MemoryOperand::new(base, Register::None, 1, offset as i64, u32::from(offset > 0), broadcast, Register::None)
        };
        Ok(match self.source.ops[v] {
            Op::Constant(bits) => {
                let place = self.constants.iter().position(|c| *c == bits).unwrap_or_else(|| {
                    self.constants.push(bits);
                    self.constants.len() - 1
                });
                at(CONSTANTS, 4 * place, broadcast)
            }
            Op::Input(i) => at(self.pointer(i)?, 0, broadcast),
            _ => at(Register::RSP, VECTOR * self.spilled[v].unwrap_or(0), false),
        })
    }

    /// A register that holds the pointer of an input or result.
    fn pointer(&mut self, entry: usize) -> Result<Register, IcedError> {
        if let Some(register) = POINTERS.get(entry) {
            return Ok((*register).into());
        }
        let from = MemoryOperand::with_base_displ(TABLE, 8 * entry as i64);
        self.push(Instruction::with2(Opcode::Mov_r64_rm64, SCRATCH.into(), from)?);
        Ok(SCRATCH.into())
    }

    /// Sixteen elements of an input or result.
    fn lanes_at(&mut self, entry: usize, format: Format) -> Result<MemoryOperand, IcedError> {
        let scale = match format {
            Format::Lanes | Format::Splat | Format::Repeated => 4,
            Format::Bf16 | Format::ToBf16 | Format::SplatBf16 | Format::F16 | Format::SplatF16 => 2,
            Format::Byte => 1,
        };
        Ok(MemoryOperand::new(self.pointer(entry)?, LANE, scale, 0, 0, false, Register::None))
    }

    /// A register with the value, while those `besides` keep theirs.
    fn fetch(&mut self, v: Value, at: usize, besides: &[Value]) -> Result<Register, IcedError> {
        if let Some(r) = self.register_of(v) {
            return Ok(zmm(r));
        }
        let register = self.free(at, &[besides, &[v]].concat())?;
        self.registers[register] = Some(v);
        let to = zmm(register);
        let splat = Opcode::EVEX_Vbroadcastss_zmm_k1z_xmmm32;
        match self.source.ops[v] {
            Op::Input(i) if self.source.inputs[i] != Format::Splat => {
                let format = self.source.inputs[i];
                let code = match format {
                    Format::Bf16 | Format::ToBf16 => Opcode::EVEX_Vpmovzxwd_zmm_k1z_ymmm256,
                    Format::Byte => Opcode::EVEX_Vpmovzxbd_zmm_k1z_xmmm128,
                    Format::F16 => WIDEN_F16,
                    Format::SplatBf16 | Format::SplatF16 => Opcode::EVEX_Vpbroadcastw_zmm_k1z_xmmm16,
                    Format::Lanes | Format::Splat | Format::Repeated => Opcode::EVEX_Vmovups_zmm_k1z_zmmm512,
                };
                let from = match format.of_lanes() {
                    true => self.lanes_at(i, format)?,
                    false => self.memory(v, false)?,
                };
                let mut load = Instruction::with2(code, to, from)?;
                if format == Format::Repeated {
                    load.set_op_mask(FIRST);
                    load.set_zeroing_masking(true);
                }
                self.body.push((load, format.of_lanes()));
                if matches!(format, Format::Bf16 | Format::SplatBf16) {
                    let code = Opcode::EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8;
                    self.push(Instruction::with3(code, to, to, 16u32)?);
                }
                if format == Format::SplatF16 {
                    self.push(Instruction::with2(WIDEN_F16, to, half_of(to))?);
                }
            }
            Op::Input(_) | Op::Constant(_) => {
                let from = self.memory(v, false)?;
                self.push(Instruction::with2(splat, to, from)?);
            }
            _ => {
                let from = self.memory(v, false)?;
                self.push(Instruction::with2(Opcode::EVEX_Vmovups_zmm_k1z_zmmm512, to, from)?);
            }
        }
        Ok(to)
    }

    /// A register for what operation `at` gives; what it reads for the last time is given up.
    fn result(&mut self, v: Value, at: usize) -> Result<Register, IcedError> {
        self.ended(at);
        let register = self.free(at, &[])?;
        self.registers[register] = Some(v);
        Ok(zmm(register))
    }

    /// Gives up what is not used after a place.
    fn ended(&mut self, at: usize) {
        self.uses.iter_mut().for_each(|u| {
            while u.last().is_some_and(|next| *next <= at) {
                u.pop();
            }
        });
        let (uses, of_rows) = (&self.uses, &self.of_rows);
        self.registers.iter_mut().for_each(|r| *r = r.filter(|v| !uses[*v].is_empty() || of_rows.contains(v)));
    }

    /// A free register; if there is none, that of the value whose next use is farthest away, but for those to keep.
    fn free(&mut self, at: usize, keep: &[Value]) -> Result<usize, IcedError> {
        if let Some(free) = self.registers.iter().position(Option::is_none) {
            return Ok(free);
        }
        let next = |v: Value| self.uses[v].iter().rev().find(|u| **u >= at).copied().unwrap_or(usize::MAX);
        let held = self.registers.iter().enumerate().filter_map(|(r, v)| v.map(|v| (r, v)));
        let farthest =
            held.filter(|(_, v)| !keep.contains(v) && !self.of_rows.contains(v)).max_by_key(|(_, v)| next(*v));
        let (register, v) = farthest.expect("an operation keeps at most four, and the stores `RESULTS`");
        self.spill(v, register)?;
        Ok(register)
    }

    /// Keeps a register's value on the stack, if it cannot be loaded again.
    fn spill(&mut self, v: Value, register: usize) -> Result<(), IcedError> {
        let again = matches!(self.source.ops[v], Op::Input(_) | Op::Constant(_));
        if !again && self.spilled[v].is_none() {
            self.spilled[v] = Some(self.slots);
            self.slots += 1;
            let to = self.memory(v, false)?;
            self.push(Instruction::with2(Opcode::EVEX_Vmovups_zmmm512_k1z_zmm, to, zmm(register))?);
        }
        Ok(())
    }
}

/// The values that an operation reads.
pub fn arguments(op: &Op) -> Vec<Value> {
    match *op {
        Op::Input(_) | Op::Constant(_) => vec![],
        Op::One(_, a) => vec![a],
        Op::Two(_, a, b) => vec![a, b],
        Op::TimesPlus(values) => values.to_vec(),
        Op::Choose(_, values) => values.to_vec(),
    }
}

/// The instruction for the lanes that are left over.
fn masked(mut instruction: Instruction) -> Instruction {
    instruction.set_op_mask(REST);
    let to_register = instruction.op0_register();
    instruction.set_zeroing_masking(to_register.is_zmm());
    instruction
}
