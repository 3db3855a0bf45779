//! `device`: where tensors live, on this machine or behind servers of others.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{Reader, Spec};

/// Where tensors live.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeviceChoice {
    /// CUDA, else a hardware WebGPU adapter, else flex: the first that is there.
    Auto,
    /// Burn's fast CPU backend.
    Flex,
    /// The CPU backend on the `ndarray` crate.
    NdArray,
    /// A GPU through WebGPU; the number picks one of several.
    Wgpu(Option<usize>),
    /// An NVIDIA GPU; the number picks one of several.
    Cuda(Option<usize>),
    /// A device that `emberlora serve` hosts.
    Remote(RemoteAddress),
}

/// Which device of which server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RemoteAddress {
    /// A name or an address; IPv6 in brackets.
    pub host: String,
    /// The port that the server listens on.
    pub port: u16,
    /// Which of the server's devices, counted from 0.
    pub index: usize,
}

/// One device, or several that share the batches of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices(Vec<DeviceChoice>);

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` {message} (allowed: {ALLOWED})")]
pub struct DeviceChoiceError {
    text: String,
    message: String,
}

impl Devices {
    /// The one that holds the adapters and the optimizer's state: the first of the list.
    pub fn first(&self) -> &DeviceChoice {
        &self.0[0]
    }

    /// All of them, at least one.
    pub fn all(&self) -> &[DeviceChoice] {
        &self.0
    }
}

impl From<DeviceChoice> for Devices {
    fn from(choice: DeviceChoice) -> Self {
        Self(vec![choice])
    }
}

impl FromIterator<DeviceChoice> for Devices {
    /// # Panics
    /// When there is none.
    fn from_iter<I: IntoIterator<Item = DeviceChoice>>(choices: I) -> Self {
        let choices: Vec<_> = choices.into_iter().collect();
        assert!(!choices.is_empty(), "a run needs a device");
        Self(choices)
    }
}

impl fmt::Display for Devices {
    /// The spelling used in recipes, with a comma between two devices.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, choice) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { ", " })?;
            choice.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for DeviceChoice {
    /// The spelling used in recipes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Flex => f.write_str("flex"),
            Self::NdArray => f.write_str("ndarray"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
            Self::Remote(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, index } = self;
        write!(f, "{SCHEME}{host}:{port}")?;
        if *index == 0 { Ok(()) } else { write!(f, "/{index}") }
    }
}

impl FromStr for DeviceChoice {
    type Err = DeviceChoiceError;

    fn from_str(text: &str) -> Result<Self, DeviceChoiceError> {
        parse(text).map_err(|mistake| DeviceChoiceError {
            text: text.to_owned(),
            message: match mistake {
                Mistake::Unknown(_) => "is no device".to_owned(),
                Mistake::Malformed(message) => message,
            },
        })
    }
}

const SCHEME: &str = "remote://";
const ALLOWED: &str = "auto, flex, ndarray, wgpu, wgpu:N, cuda, cuda:N or remote://HOST:PORT";
const NAMES: [&str; 6] = ["auto", "flex", "ndarray", "wgpu", "cuda", "remote"];

enum Mistake<'a> {
    /// The part in front of the colon.
    Unknown(&'a str),
    Malformed(String),
}

fn parse(text: &str) -> Result<DeviceChoice, Mistake<'_>> {
    if let Some(address) = text.strip_prefix(SCHEME) {
        let malformed = || Mistake::Malformed("is no address of a server".to_owned());
        return remote(address).map(DeviceChoice::Remote).ok_or_else(malformed);
    }
    let (name, index) = match text.split_once(':') {
        None => (text, None),
        Some((name, index)) => match number(index) {
            Some(index) => (name, Some(index)),
            None => return Err(Mistake::Malformed("is not the number of a device".to_owned())),
        },
    };
    match (name, index) {
        ("auto", None) => Ok(DeviceChoice::Auto),
        ("flex", None) => Ok(DeviceChoice::Flex),
        ("ndarray", None) => Ok(DeviceChoice::NdArray),
        ("wgpu", index) => Ok(DeviceChoice::Wgpu(index)),
        ("cuda", index) => Ok(DeviceChoice::Cuda(index)),
        ("auto" | "flex" | "ndarray", Some(_)) => Err(Mistake::Malformed(format!("`{name}` takes no number"))),
        _ => Err(Mistake::Unknown(name)),
    }
}

/// `HOST:PORT` or `HOST:PORT/N`.
fn remote(address: &str) -> Option<RemoteAddress> {
    let (address, index) = match address.split_once('/') {
        None => (address, 0),
        Some((address, index)) => (address, number(index)?),
    };
    let (host, port) = address.rsplit_once(':')?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let sound = match bracketed {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')),
    };
    let port = number(port).and_then(|port| u16::try_from(port).ok()).filter(|&port| port > 0)?;
    sound.then(|| RemoteAddress { host: host.to_owned(), port, index })
}

/// `usize::from_str` would take a sign, as in `cuda:+1`.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// A device, or a list of them.
pub(crate) struct DevicesSpec;

impl DevicesSpec {
    fn read_one(&self, node: &Node, reader: &mut Reader<'_>) -> Option<DeviceChoice> {
        let Content::Text(text) = &node.content else {
            return reader.wrong_type(node, self.allowed());
        };
        match parse(text) {
            Ok(choice) => Some(choice),
            Err(Mistake::Unknown(name)) => reader.unknown_name(node, name, &NAMES, self.allowed()),
            Err(Mistake::Malformed(message)) => reader.refuse(node, message, self.allowed()),
        }
    }
}

impl Spec for DevicesSpec {
    type Out = Devices;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Devices> {
        let Content::List(items) = &node.content else {
            return self.read_one(node, reader).map(Devices::from);
        };
        if items.is_empty() {
            return reader.refuse(node, "is empty", self.allowed());
        }
        let mut read: Vec<Option<DeviceChoice>> = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let choice = reader.item(index, |reader| {
                let choice = self.read_one(item, reader)?;
                if choice == DeviceChoice::Auto && items.len() > 1 {
                    return reader.refuse(item, "`auto` takes one device and stands alone", self.allowed());
                }
                if read.contains(&Some(choice.clone())) {
                    return reader.refuse(item, "stands in the list already", self.allowed());
                }
                Some(choice)
            });
            read.push(choice);
        }
        read.into_iter().collect::<Option<Vec<_>>>().map(Devices)
    }

    fn write(&self, value: &Devices) -> Node {
        match value.all() {
            [choice] => Node::text(choice.to_string()),
            choices => Node::list(choices.iter().map(|choice| Node::text(choice.to_string()))),
        }
    }

    fn allowed(&self) -> String {
        format!("{ALLOWED}, or a list of them")
    }

    fn schema(&self) -> Json {
        let one = json!({
            "type": "string",
            "pattern": "^(auto|flex|ndarray|(wgpu|cuda)(:[0-9]+)?|remote://[^/]+:[0-9]+(/[0-9]+)?)$",
        });
        json!({"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "uniqueItems": true}]})
    }
}
