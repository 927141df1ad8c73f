//! `aegis-mcp-guest`: the guest API of this machine as an MCP server over stdio, for agents that
//! run inside (contracts/aegis.md 6). It translates and decides nothing: the host judges every call.
//!
//! ```text
//! agent ── JSON-RPC lines, stdio ──▶ server ──▶ tools ──▶ api ── HTTP ──▶ harness
//! ```
//! Start reading at [`tools`] for what an agent can do.

mod api;
mod output;
mod server;
mod stdio;
mod tools;

use anyhow::Context as _;
use rmcp::service::ServerInitializeError;
use rmcp::transport::async_rw::AsyncRwTransport;

use crate::api::Api;
use crate::server::Server;
use crate::stdio::Answering;

/// Longest message of an agent, bytes: the guest API takes no larger request either.
const MESSAGE_MAX: usize = 1 << 20;

fn main() -> anyhow::Result<()> {
    if let Some(argument) = std::env::args().nth(1) {
        match argument.as_str() {
            "--version" | "-V" => println!("aegis-mcp-guest {}", env!("CARGO_PKG_VERSION")),
            _ => println!(
                "An MCP server over stdio; an agent starts it without arguments. In .mcp.json:\n\
                 {{\"mcpServers\": {{\"aegis\": {{\"command\": \"{}\", \"args\": []}}}}}}",
                aegis_wire::channel::guest::MCP_PATH
            ),
        }
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    let ended = runtime.block_on(serve());
    // The thread that reads stdin can't be interrupted; nobody waits for it.
    runtime.shutdown_background();
    ended
}

async fn serve() -> anyhow::Result<()> {
    let api = Api::from_env().context("AEGIS_GUEST_API")?;
    let server = Server::new(api).await;
    let pipe = AsyncRwTransport::new_server(tokio::io::stdin(), tokio::io::stdout())
        .with_max_line_length(MESSAGE_MAX);
    match rmcp::serve_server(server, Answering::new(pipe)).await {
        Ok(running) => {
            running.waiting().await.context("the server ended badly")?;
            Ok(())
        }
        // An agent that leaves before it says hello is no fault of ours.
        Err(ServerInitializeError::ConnectionClosed(_)) => Ok(()),
        Err(e) => Err(e).context("the agent does not speak MCP"),
    }
}
