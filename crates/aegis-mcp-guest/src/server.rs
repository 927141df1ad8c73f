//! The MCP side: which tools an agent sees, and what becomes of a call.

use std::sync::atomic::{AtomicBool, Ordering};

use hyper::Method;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, Implementation, ListToolsResult,
    PaginatedRequestParams, ServerCapabilities, ServerConfig,
};
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::{Value, json};

use crate::api::Api;
use crate::tools::Tool;

/// The server's name (contracts/aegis.md 6).
const NAME: &str = "aegis-guest";

/// Serves one agent.
pub struct Server {
    api: Api,
    /// This instance may spawn; the last that was heard.
    may_spawn: AtomicBool,
}

impl Server {
    /// Asks the API first who this instance is, because the instructions name its tools.
    pub async fn new(api: Api) -> Server {
        let server = Server { api, may_spawn: AtomicBool::new(false) };
        server.look().await;
        server
    }

    /// Whether this instance may spawn. An API that does not answer changes nothing.
    async fn look(&self) -> bool {
        if let Ok(own) = self.api.ask(Method::GET, "/v1/self", None).await {
            let spawn = own.pointer("/capabilities/spawn").and_then(Value::as_bool);
            self.may_spawn.store(spawn == Some(true), Ordering::Relaxed);
        }
        self.may_spawn.load(Ordering::Relaxed)
    }

    fn instructions(&self) -> String {
        let spawn = self.may_spawn.load(Ordering::Relaxed);
        let names: Vec<&str> = Tool::visible(spawn).map(Tool::name).collect();
        let can = if spawn {
            "You run inside an Aegis machine and may spawn child machines of your own: real, \
             separate VMs, for builds, tests or services. Spawn one, wait until instance_list says \
             running, work in it with instance_exec, and delete it when you are done: all your \
             machines share one spending limit (self_info: envelope). When you end, they end."
        } else {
            "You run inside an Aegis machine. It may not spawn child machines; instance_spawn \
             would be refused."
        };
        format!(
            "{can} A refused call says which rule refused it, what would be allowed, and a hint. \
             Tools: {}.",
            names.join(", ")
        )
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new(NAME, env!("CARGO_PKG_VERSION")))
            .with_instructions(self.instructions())
    }

    async fn list_tools(
        &self,
        _page: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let spawn = self.look().await;
        Ok(ListToolsResult::with_all_items(Tool::visible(spawn).map(Tool::define).collect()))
    }

    async fn call_tool(
        &self,
        call: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        // Also one that is not shown: the host says better than we why it must not be.
        let Some(tool) = Tool::named(&call.name) else {
            let message = format!("there is no tool {:?}", call.name);
            return Err(ErrorData::invalid_params(message, None));
        };
        let arguments = Value::Object(call.arguments.unwrap_or_default());
        let outcome = tokio::select! {
            outcome = tool.call(&self.api, arguments) => outcome,
            // Nobody reads the answer any more.
            () = context.ct.cancelled() => Ok(json!({ "status": "cancelled" })),
        };
        Ok(match outcome {
            Ok(value) => CallToolResult::structured(value),
            Err(error) => CallToolResult::structured_error(error.body()),
        }
        .into())
    }
}
