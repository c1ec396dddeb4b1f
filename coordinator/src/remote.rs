//! The client's side of a session on workers: every call blocks.

use crate::error::Failure;
use crate::session::{Options, Peak};
use mesh::array::Array;
use mesh::program::Program;
use mesh::region::Region;
use proto::control::{
    ArrayName, ArrayPart, OpenPart, Opened, SessionName, Settings, StepRequest, control_client::ControlClient,
    open_part,
};
use tokio::runtime::{Builder, Runtime};
use tokio_stream::{StreamExt, iter};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use worker::node::{MESSAGE_BYTES, endpoint};
use worker::tls::{self, Role};
use worker::wire::{self, Assembler};

/// A session that a coordinator holds.
pub(crate) struct Remote {
    runtime: Runtime,
    client: ControlClient<Channel>,
    epoch: u64,
    /// How devices reach their peers, a line each.
    pub links: Vec<String>,
    /// The session lasts for as long as this.
    _held: Streaming<Opened>,
}

/// What a coordinator answers in place of a result.
fn failed(status: Status) -> Failure {
    Failure::Mesh(status.message().to_string())
}

/// Why there is no connection to a coordinator.
fn unreachable(url: &str, e: &(dyn std::error::Error + 'static)) -> Failure {
    let coordinator = url.into();
    match tls::refusal(e) {
        Some(reason) => Failure::Refused { coordinator, reason },
        None => Failure::Unreachable { coordinator, reason: tls::causes(e) },
    }
}

impl Remote {
    /// Opens a session.
    ///
    /// # Errors
    /// A coordinator that is not there, has too few workers, or refuses the program.
    pub fn open(url: &str, program: &Program, options: &Options) -> Result<Remote, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|e| Failure::Mesh(e.to_string()))?;
        let bytes = bytes::Bytes::from(wire::encode(program)?);
        let settings = Settings {
            mesh: options.mesh.to_string(),
            layout: options.layout.to_string(),
            seed: options.seed,
            memory: options.memory.unwrap_or(0) as u64,
            transport: options.transport.to_string(),
        };
        let (client, opened, held) = runtime.block_on(async {
            let endpoint = endpoint(url, options.tls.as_ref(), Role::Coordinator)?;
            let channel = endpoint.connect().await.map_err(|e| unreachable(url, &e))?;
            let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
            let data = (0..bytes.len()).step_by(wire::PART_BYTES);
            let data = data.map(|i| open_part::Kind::Program(bytes.slice(i..(i + wire::PART_BYTES).min(bytes.len()))));
            let parts: Vec<OpenPart> = std::iter::once(open_part::Kind::Settings(settings))
                .chain(data)
                .map(|k| OpenPart { kind: Some(k) })
                .collect();
            // A certificate that the coordinator does not accept shows only now.
            let opened = client.open(iter(parts)).await;
            let opened = opened.map_err(|s| match (std::error::Error::source(&s), s.code()) {
                (Some(_), _) => unreachable(url, &s),
                (None, Code::PermissionDenied) => {
                    Failure::Refused { coordinator: url.into(), reason: s.message().into() }
                }
                (None, _) => failed(s),
            });
            let mut held = opened?.into_inner();
            let opened = held.next().await.ok_or_else(|| Failure::Mesh("the session ended at once".into()))?;
            Ok::<_, Failure>((client, opened.map_err(failed)?, held))
        })?;
        Ok(Remote { runtime, client, epoch: opened.epoch, links: opened.links, _held: held })
    }

    fn name(&self, function: &str, name: &str) -> ArrayName {
        ArrayName { epoch: self.epoch, function: function.into(), name: name.into() }
    }

    fn parts(&self, function: &str, name: &str, array: &Array) -> Vec<ArrayPart> {
        let whole = array.shape().iter().map(|n| ("".into(), 0..*n)).collect();
        wire::parts(self.name(function, name), 0, &Region(whole), array)
    }

    /// Feeds a function.
    pub fn feed(&mut self, function: &str, name: &str, array: &Array) -> Result<(), Failure> {
        let parts = self.parts(function, name, array);
        self.runtime.block_on(self.client.feed(iter(parts))).map(|_| ()).map_err(failed)
    }

    /// Runs a function.
    pub fn step(&mut self, function: &str, step: u32) -> Result<(), Failure> {
        let request = StepRequest { epoch: self.epoch, function: function.into(), step };
        self.runtime.block_on(self.client.step(request)).map(|_| ()).map_err(failed)
    }

    /// A result of a function, or a variable (of no function).
    pub fn fetch(&self, function: &str, name: &str) -> Result<Array, Failure> {
        let (request, mut client) = (self.name(function, name), self.client.clone());
        self.runtime.block_on(async {
            let mut stream = client.fetch(request).await.map_err(failed)?.into_inner();
            let mut assembler = Assembler::default();
            while let Some(part) = stream.next().await {
                if let Some((_, array)) = assembler.take(part.map_err(failed)?).map_err(Failure::Mesh)? {
                    return Ok(array);
                }
            }
            Err(Failure::Mesh(format!("`{name}` came cut short")))
        })
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &str, array: &Array) -> Result<(), Failure> {
        let parts = self.parts("", name, array);
        self.runtime.block_on(self.client.set(iter(parts))).map(|_| ()).map_err(failed)
    }

    /// Predicted and measured memory, by device.
    pub fn peaks(&self) -> Result<Vec<Peak>, Failure> {
        let mut client = self.client.clone();
        let reply =
            self.runtime.block_on(client.memory(SessionName { epoch: self.epoch })).map_err(failed)?.into_inner();
        let mut devices = reply.devices;
        devices.sort_by_key(|d| d.device);
        let peak = |d: proto::control::DeviceMemory| Peak {
            peak_bytes_predicted: d.predicted as usize,
            peak_bytes_measured: d.measured as usize,
        };
        Ok(devices.into_iter().map(peak).collect())
    }
}
