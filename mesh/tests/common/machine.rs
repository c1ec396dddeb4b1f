//! A machine whose times are reckoned by hand.

use mesh::machine::Machine;

/// Products take a second a FLOP and nothing else; a byte between devices of a host takes 10 seconds, one to another host
/// 1000, after a latency of 1 and of 50.
pub const SIMPLE: &str = "
    name = 'simple'
    devices = 2
    memory = 1000000
    [rates.default]
    launch = 0.0
    flops = 1e30
    flops_bf16 = 1e30
    bytes = 1e30
    [rates.product]
    launch = 3.0
    flops = 1.0
    flops_bf16 = 2.0
    bytes = 1e30
    [within]
    latency = 1.0
    bytes = 0.1
    [between]
    latency = 50.0
    bytes = 0.001
";

/// That machine.
pub fn simple() -> Machine {
    Machine::from_toml(SIMPLE).unwrap()
}
