//! TCP ports on the machine's loopback, for the host.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use aegis_wire::channel::guest::API_PORT;
use aegis_wire::channel::{PORT_OPEN, PORT_REFUSED};
use aegis_wire::pipe::mux::Stream;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

/// How long a connection inside may take: only one whose listener is overrun takes any time.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Copied at a time and direction, bytes.
const COPY: usize = 16 * 1024;
/// The kernel has no event for "somebody listens". Looking costs little, so it is done often.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Enough of a socket table for all listeners, which come first, bytes.
const TABLE_MAX: u64 = 256 * 1024;

/// Connects the stream with a port inside, each direction closing on its own.
pub async fn serve(mut stream: Stream, port: u16) {
    // The other side may leave in any way; that is the end of it, not an error.
    let _ = connect_through(&mut stream, port).await;
}

async fn connect_through(stream: &mut Stream, port: u16) -> io::Result<()> {
    // The guest API takes whoever reaches it for the machine itself: nobody outside may.
    let found = if port == API_PORT { None } else { connect(port).await };
    let Some(mut inside) = found else {
        stream.write_all(&[PORT_REFUSED]).await?;
        return stream.shutdown().await;
    };
    stream.write_all(&[PORT_OPEN]).await?;
    stream.flush().await?;
    tokio::io::copy_bidirectional_with_sizes(stream, &mut inside, COPY, COPY).await?;
    Ok(())
}

async fn connect(port: u16) -> Option<TcpStream> {
    let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    for address in addresses {
        let connecting = TcpStream::connect((address, port));
        if let Ok(Ok(inside)) = tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            let _ = inside.set_nodelay(true);
            return Some(inside);
        }
    }
    None
}

/// Waits until somebody listens on a port that [`serve`] reaches; false when nobody does in time.
pub async fn until_listens(port: u16, deadline: Duration) -> bool {
    let looking = async {
        while !listens(port) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::time::timeout(deadline, looking).await.is_ok()
}

fn listens(port: u16) -> bool {
    // Reading is cheaper than connecting, and disturbs nobody.
    let table = |name: &str| -> io::Result<String> {
        let mut text = String::new();
        std::fs::File::open(name)?.take(TABLE_MAX).read_to_string(&mut text)?;
        Ok(text)
    };
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .any(|name| table(name).is_ok_and(|text| has_listener(&text, port)))
}

/// Whether a table like /proc/net/tcp has a listener on the port, on an address that loopback
/// connections reach.
fn has_listener(table: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    const REACHED: [&str; 4] = [
        "00000000",
        "0100007F",
        "00000000000000000000000000000000",
        "00000000000000000000000001000000",
    ];
    table.lines().skip(1).any(|line| {
        let mut words = line.split_ascii_whitespace();
        let (Some(local), Some(state)) = (words.nth(1), words.nth(1)) else { return false };
        let Some((address, its_port)) = local.split_once(':') else { return false };
        state == LISTEN
            && REACHED.contains(&address)
            && u16::from_str_radix(its_port, 16) == Ok(port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18 1
   1: 0A00020F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 19 1
   2: 0100007F:0050 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 20 1
";

    #[test]
    fn only_listeners_on_loopback_count() {
        assert!(has_listener(TABLE, 8080));
        assert!(!has_listener(TABLE, 22), "on another address");
        assert!(!has_listener(TABLE, 80), "a connection");
        assert!(!has_listener("garbage\na b\n1: x:y z 0A", 0));
    }

    #[tokio::test]
    async fn a_real_listener_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(until_listens(port, Duration::from_secs(5)).await);
        drop(listener);
        assert!(!until_listens(port, Duration::from_millis(30)).await);
    }
}
