//! Devices of other processes and machines, over the WebSocket transport of burn-remote.

use std::fmt;

use burn::tensor::Device;
use emberlora_config::RemoteAddress;

/// The environment variable that holds the token, for servers and their clients alike. It is not a key of the recipe,
/// since a recipe is written beside every adapter.
pub const TOKEN: &str = "EMBERLORA_TOKEN";

/// Why the device of a server cannot be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemoteError {
    /// Remote devices were left out when this program was compiled.
    #[error(
        "`{what}` needs remote devices, which are not compiled in; get them with `cargo build --release --features remote`"
    )]
    NotCompiledIn {
        /// What needs them.
        what: String,
    },
    /// Nothing answers there, or what answers is no server of devices.
    #[error("the server {address} cannot be reached: {reason}; start it with `emberlora serve --listen HOST:PORT`")]
    Unreachable {
        /// The server.
        address: RemoteAddress,
        /// What the transport says.
        reason: String,
    },
    /// The server wants another token.
    #[error(
        "the server {address} refuses {}; set {TOKEN} to the one that `emberlora serve` prints or was given",
        if *given { "the token" } else { "a client without a token" }
    )]
    Refused {
        /// The server.
        address: RemoteAddress,
        /// Whether a token was presented.
        given: bool,
    },
    /// The server hosts fewer devices.
    #[error("the server {address} hosts {hosted} device{}, counted from 0", if *hosted == 1 { "" } else { "s" })]
    NoSuchDevice {
        /// The server and the number that was asked for.
        address: RemoteAddress,
        /// How many devices it hosts.
        hosted: usize,
    },
    /// The server was built with another release of Burn.
    #[error("the server {address} speaks another protocol ({reason}); build both with the same version of emberlora")]
    Protocol {
        /// The server.
        address: RemoteAddress,
        /// The versions.
        reason: String,
    },
}

impl RemoteError {
    /// Whether trying again can help.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// A secret that a client presents to a server. Never printed by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// `None` for an empty text, which is what a client without a token presents.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// The one in the environment.
    pub fn from_environment() -> Option<Self> {
        std::env::var(TOKEN).ok().and_then(|text| Self::new(&text))
    }

    /// The secret itself.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Opens a session with a server; a second one with the same device is the first.
#[cfg(feature = "remote")]
pub(crate) fn connect(address: &RemoteAddress) -> Result<Device, RemoteError> {
    use burn::remote::{ConnectError, RemoteHost};

    let token = Token::from_environment();
    let host = RemoteHost::websocket(&format!("ws://{}:{}", address.host, address.port));
    let host = match &token {
        Some(token) => host.with_credential(token.secret()),
        None => host,
    };
    let failed = |error: ConnectError| {
        let address = address.clone();
        match error {
            ConnectError::Unauthorized => RemoteError::Refused { address, given: token.is_some() },
            ConnectError::NoSuchDevice { device_count } => RemoteError::NoSuchDevice { address, hosted: device_count },
            ConnectError::IncompatibleProtocol { .. } => RemoteError::Protocol { address, reason: error.to_string() },
            ConnectError::Unreachable { reason } => RemoteError::Unreachable { address, reason },
            other => RemoteError::Unreachable { address, reason: other.to_string() },
        }
    };
    Device::remote_options(&host).device_index(address.index).init().map_err(failed)
}

#[cfg(not(feature = "remote"))]
pub(crate) fn connect(address: &RemoteAddress) -> Result<Device, RemoteError> {
    Err(RemoteError::NotCompiledIn { what: format!("device: {address}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> RemoteAddress {
        RemoteAddress { host: "127.0.0.1".to_owned(), port: 1, index: 0 }
    }

    #[test]
    #[cfg(not(feature = "remote"))]
    fn a_build_without_remote_devices_says_how_to_get_them() {
        let error = connect(&address()).unwrap_err();
        assert!(error.to_string().contains("`device: remote://127.0.0.1:1`"), "{error}");
        assert!(error.to_string().contains("--features remote"), "{error}");
        assert!(!error.may_pass());
    }

    #[test]
    #[cfg(feature = "remote")]
    fn where_nothing_listens_the_error_names_the_address() {
        let error = connect(&address()).unwrap_err();
        assert!(error.to_string().contains("the server remote://127.0.0.1:1 cannot be reached"), "{error}");
        assert!(error.may_pass());
    }

    #[test]
    fn a_token_is_never_printed() {
        let token = Token::new(" secret\n").unwrap();
        assert_eq!(token.secret(), "secret");
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert_eq!(Token::new(" \n"), None);
    }
}
