//! Hosting devices for other processes and machines.

use std::io;
use std::net::SocketAddr;

use emberlora_config::DeviceChoice;

use crate::device::DeviceError;
use crate::remote::{RemoteError, Token};

/// Why devices cannot be hosted.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// One of them is not to be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// This program was compiled without.
    #[error(transparent)]
    NotCompiledIn(#[from] RemoteError),
    /// Burn's server cannot host a device of another server.
    #[error("`{0}` is another server's device; name one of this machine")]
    Remote(DeviceChoice),
    /// Burn's server hosts devices of one backend.
    #[error("`{0}` and `{1}` belong to different backends; start a server for each, on ports of their own")]
    MixedBackends(DeviceChoice, DeviceChoice),
    /// Whoever reaches the address could compute here.
    #[error("without a token a server listens on this machine alone, not on {0}; leave --no-token out")]
    Open(SocketAddr),
    /// The address is taken, or not one of this machine.
    #[error("cannot listen on {address}: {source}; choose another address of this machine with `--listen`")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        source: io::Error,
    },
    /// The server broke down.
    #[error("the server stopped: {0}")]
    Stopped(String),
}

impl ServeError {
    /// Whether what was asked for is to blame, so that trying again changes nothing.
    pub fn is_wrong_input(&self) -> bool {
        !matches!(self, Self::Listen { .. } | Self::Stopped(_))
    }
}

/// Devices about to be hosted on an address that is bound already.
#[derive(Debug)]
pub struct Server {
    /// The address, with the port that was found where 0 was asked for.
    pub address: SocketAddr,
    /// The devices, in the order in which clients count them.
    pub devices: Vec<DeviceChoice>,
    open: Open,
}

/// A build without remote devices opens nothing, so that there is no server of it to run.
#[cfg(not(feature = "remote"))]
#[derive(Debug)]
enum Open {}

#[cfg(feature = "remote")]
#[derive(Debug)]
struct Open {
    listener: std::net::TcpListener,
    devices: Vec<burn::tensor::Device>,
    token: Option<Token>,
}

impl Server {
    /// Opens the devices and binds the address. Only clients that present `token` will be served; without one, all that
    /// reach the address.
    ///
    /// # Errors
    /// [`ServeError`]; a server without a token must not be reachable from other machines.
    #[cfg(feature = "remote")]
    pub fn bind(choices: &[DeviceChoice], address: SocketAddr, token: Option<Token>) -> Result<Self, ServeError> {
        if token.is_none() && !address.ip().is_loopback() {
            return Err(ServeError::Open(address));
        }
        let (mut devices, mut named) = (Vec::new(), Vec::new());
        for choice in choices {
            if matches!(choice, DeviceChoice::Remote(_)) {
                return Err(ServeError::Remote(choice.clone()));
            }
            let chosen = crate::device::choose(choice)?;
            devices.push(chosen.device);
            named.push(chosen.choice);
        }
        let backend = |choice: &DeviceChoice| match choice {
            // Every CubeCL runtime is one backend.
            DeviceChoice::Wgpu(_) | DeviceChoice::Cuda(_) => "cube",
            DeviceChoice::NdArray => "ndarray",
            _ => "flex",
        };
        if let Some(other) = named.iter().find(|other| backend(other) != backend(&named[0])) {
            return Err(ServeError::MixedBackends(named[0].clone(), other.clone()));
        }
        let listen = |source| ServeError::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        Ok(Self { address, devices: named, open: Open { listener, devices, token } })
    }

    /// Says that this build cannot host devices.
    ///
    /// # Errors
    /// [`ServeError::NotCompiledIn`], always.
    #[cfg(not(feature = "remote"))]
    pub fn bind(_: &[DeviceChoice], _: SocketAddr, _: Option<Token>) -> Result<Self, ServeError> {
        Err(RemoteError::NotCompiledIn { what: "emberlora serve".to_owned() }.into())
    }

    /// Serves until the process is asked to end, by Ctrl-C or SIGTERM.
    ///
    /// # Errors
    /// [`ServeError::Stopped`].
    #[cfg(feature = "remote")]
    pub fn run(self) -> Result<(), ServeError> {
        use burn::server::{RemoteServer, TokenAuthorizer, WebSocketTransport};

        let stopped = |error: &dyn std::fmt::Display| ServeError::Stopped(error.to_string());
        let server = RemoteServer::new(self.open.devices);
        let server = match &self.open.token {
            Some(token) => {
                server.with_authorizer(TokenAuthorizer::new(token.secret()).map_err(|error| stopped(&error))?)
            }
            None => server,
        };
        server.serve(WebSocketTransport::from_listener(self.open.listener)).map_err(|error| stopped(&error))
    }

    /// Says that there is nothing to run, since [`Server::bind`] made nothing.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "remote"))]
    pub fn run(self) -> Result<(), ServeError> {
        match self.open {}
    }
}
