//! JSON-RPC 2.0 messages of the control stream, one per frame: length (4, big-endian), JSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Unknown method.
pub const CODE_METHOD: i32 = -32601;
/// Bad params.
pub const CODE_PARAMS: i32 = -32602;
/// The other side failed by its own fault.
pub const CODE_INTERNAL: i32 = -32603;
/// Not a JSON-RPC message.
pub const CODE_INVALID: i32 = -32600;
/// Denied (contracts/aegis.md 5).
pub const CODE_DENIED: i32 = -32001;
/// The envelope has nothing left.
pub const CODE_EXHAUSTED: i32 = -32002;
/// Not found.
pub const CODE_NOT_FOUND: i32 = -32003;
/// Not in a state for that.
pub const CODE_CONFLICT: i32 = -32004;

/// Over a rate.
pub const CODE_RATE: i32 = -32005;
/// Nobody there to answer, or no room, for now.
pub const CODE_UNAVAILABLE: i32 = -32006;
/// The disk is full.
pub const CODE_NO_SPACE: i32 = -32007;

/// A message in either direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Always `"2.0"`.
    pub jsonrpc: Version,
    /// Present in requests and their answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Present in requests and notifications.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Of a request or notification.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub params: Value,
    /// Of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

/// The literal `"2.0"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// The only one.
    #[serde(rename = "2.0")]
    V2,
}

/// An error answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// One of the `CODE_` constants.
    pub code: i32,
    /// One sentence.
    pub message: String,
    /// A denial object, where there is one.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

impl RpcError {
    /// An error without data.
    pub fn new(code: i32, message: impl Into<String>) -> RpcError {
        RpcError { code, message: message.into(), data: Value::Null }
    }
}

impl Message {
    /// A request.
    pub fn request(id: u64, method: &str, params: Value) -> Message {
        Message { id: Some(id), ..Message::notification(method, params) }
    }

    /// A notification.
    pub fn notification(method: &str, params: Value) -> Message {
        Message {
            jsonrpc: Version::V2,
            id: None,
            method: Some(method.to_owned()),
            params,
            result: None,
            error: None,
        }
    }

    /// The answer to request `id`.
    pub fn answer(id: u64, outcome: Result<Value, RpcError>) -> Message {
        let (result, error) = match outcome {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error)),
        };
        Message {
            jsonrpc: Version::V2,
            id: Some(id),
            method: None,
            params: Value::Null,
            result,
            error,
        }
    }
}
