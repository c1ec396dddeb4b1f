//! The instruction set that kernels are compiled for, chosen once at run time.

use std::sync::OnceLock;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// That, and matrix tiles for products of `bf16`, which add in an order of their own ([`super::amx`]).
    Amx,
}

/// What `MESH_ISA` may say.
const NAMED: [(&str, Isa); 4] =
    [("portable", Isa::Portable), ("avx2", Isa::Avx2), ("avx512", Isa::Avx512), ("amx", Isa::Amx)];

/// A `MESH_ISA` that names no instruction set.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "W0034: MESH_ISA={0} names no instruction set; let it be portable, avx2, avx512 or amx, or leave it out for the best one"
)]
pub struct UnknownIsa(String);

impl Isa {
    /// The best one this machine has, or what `MESH_ISA` (`portable`, `avx2`, `avx512`, `amx`) says if the machine has it.
    pub fn detect() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let best = Isa::best();
            Isa::asked().ok().flatten().map_or(best, |isa| isa.min(best))
        })
    }

    /// What `MESH_ISA` says, if it says anything.
    ///
    /// # Errors
    /// It names no instruction set.
    pub fn asked() -> Result<Option<Isa>, UnknownIsa> {
        let Some(asked) = std::env::var_os("MESH_ISA").filter(|asked| !asked.is_empty()) else { return Ok(None) };
        let named = NAMED.iter().find(|(name, _)| asked == *name);
        named.map(|(_, isa)| Some(*isa)).ok_or_else(|| UnknownIsa(asked.to_string_lossy().into_owned()))
    }

    fn best() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let has512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if has512 {
                let tiles = is_x86_feature_detected!("avx512bf16") && super::amx::available();
                return if tiles { Isa::Amx } else { Isa::Avx512 };
            }
            let has2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if has2 && is_x86_feature_detected!("f16c") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// Whether the machine also multiplies and adds pairs of bf16 in one instruction, and this is its best set.
    pub fn pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            self >= Isa::Avx512 && is_x86_feature_detected!("avx512bf16")
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    }

    /// Every instruction set that this machine has.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx].into_iter().filter(|i| *i <= Isa::best()).collect()
    }
}

/// Calls a function compiled for the instruction set: `dispatch!(isa, fn(arg: Type, ..) { .. })`. It is never inlined, so
/// that what it keeps in registers is its own.
#[macro_export]
macro_rules! dispatch {
    ($isa:expr, $(#[$m:meta])* fn($($arg:ident : $ty:ty),* $(,)?) $body:block) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
        #[inline(never)]
        #[allow(clippy::too_many_arguments)]
        unsafe fn avx512($($arg: $ty),*) { $body }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,bmi2")]
        #[inline(never)]
        #[allow(clippy::too_many_arguments)]
        unsafe fn avx2($($arg: $ty),*) { $body }
        #[inline(never)]
        #[allow(clippy::too_many_arguments)]
        fn portable($($arg: $ty),*) { $body }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` is only made after the machine was seen to have it.
            $crate::kernels::isa::Isa::Avx512 | $crate::kernels::isa::Isa::Amx => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::kernels::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
            _ => portable($($arg),*),
        }
    }};
}

/// Makes a function for every instruction set of one over [`super::tile::Lanes`]: `over_lanes! { name = of[](arg: Type, ..) }`.
/// What is in the brackets are constants of `of`, for AVX-512, for AVX2 and for plain Rust.
#[macro_export]
macro_rules! over_lanes {
    ($(#[$doc:meta])* $visible:vis $name:ident = $of:ident[$($wide:literal, $narrow:literal, $plain:literal)?]
        ($($arg:ident: $ty:ty),*)) => {
        $(#[$doc])*
        $visible unsafe fn $name(isa: $crate::kernels::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            use $crate::kernels::tile::x86::{Avx2, Avx512};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
            #[inline(never)]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: by the contract of the function around it.
                unsafe { $of::<Avx512 $(, $wide)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi2")]
            #[inline(never)]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $of::<Avx2 $(, $narrow)?>($($arg),*) }
            }
            // SAFETY: as above; an `Isa` is only made after the machine was seen to have it.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::isa::Isa::Avx512 | $crate::kernels::isa::Isa::Amx => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::isa::Isa::Avx2 => avx2($($arg),*),
                    _ => $of::<$crate::kernels::tile::Portable $(, $plain)?>($($arg),*),
                }
            }
        }
    };
}
