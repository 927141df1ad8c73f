//! Many clients at once, each on one connection that it keeps.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aegis_tests::house::House;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

struct Client {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Client {
    async fn connect(address: SocketAddr) -> anyhow::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Client { sender, host: address.to_string() })
    }

    async fn send(
        &mut self,
        method: &str,
        path: &str,
        body: String,
        bearer: Option<&str>,
    ) -> anyhow::Result<(u16, Bytes)> {
        let mut request =
            hyper::Request::builder().method(method).uri(path).header("host", &self.host);
        if let Some(token) = bearer {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = self.sender.send_request(request.body(Full::new(body.into()))?).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

/// Durable redeems and status reads per second.
#[tokio::main]
pub async fn rates(house: &House, clients: usize, time: Duration) -> anyhow::Result<(f64, f64)> {
    let host_token = house.token();
    // More codes than can be spent in the time.
    let codes = 4000 * usize::try_from(time.as_secs())?;
    let made: Arc<Mutex<VecDeque<String>>> = Arc::default();
    let mut makers = tokio::task::JoinSet::new();
    for _ in 0..clients {
        let (made, token) = (Arc::clone(&made), host_token.clone());
        let mut client = Client::connect(house.address()).await?;
        let each = codes / clients;
        makers.spawn(async move {
            for _ in 0..each {
                let body = json!({"createdBy": "bench"}).to_string();
                let (status, body) =
                    client.send("POST", "/couch/invites", body, Some(&token)).await.unwrap();
                assert_eq!(status, 201);
                let invite: Value = serde_json::from_slice(&body).unwrap();
                made.lock().unwrap().push_back(invite["code"].as_str().unwrap().to_owned());
            }
        });
    }
    makers.join_all().await;

    let tokens: Arc<Mutex<Vec<String>>> = Arc::default();
    let began = Instant::now();
    let mut redeemers = tokio::task::JoinSet::new();
    for _ in 0..clients {
        let (made, tokens) = (Arc::clone(&made), Arc::clone(&tokens));
        let mut client = Client::connect(house.address()).await?;
        redeemers.spawn(async move {
            let mut done = 0u32;
            while began.elapsed() < time {
                let Some(code) = made.lock().unwrap().pop_front() else { break };
                let body = json!({"code": code, "name": "bench"}).to_string();
                let (status, body) =
                    client.send("POST", "/couch/redeem", body, None).await.unwrap();
                assert_eq!(status, 201);
                let guest: Value = serde_json::from_slice(&body).unwrap();
                tokens.lock().unwrap().push(guest["authToken"].as_str().unwrap().to_owned());
                done += 1;
            }
            done
        });
    }
    let redeems: u32 = redeemers.join_all().await.iter().sum();
    let redeem_rate = f64::from(redeems) / began.elapsed().as_secs_f64();

    let tokens = tokens.lock().unwrap().clone();
    let began = Instant::now();
    let mut readers = tokio::task::JoinSet::new();
    for n in 0..clients {
        let token = tokens[n % tokens.len()].clone();
        let mut client = Client::connect(house.address()).await?;
        readers.spawn(async move {
            let mut done = 0u32;
            while began.elapsed() < time {
                let (status, _) =
                    client.send("GET", "/couch/status", String::new(), Some(&token)).await.unwrap();
                assert_eq!(status, 200);
                done += 1;
            }
            done
        });
    }
    let reads: u32 = readers.join_all().await.iter().sum();
    Ok((redeem_rate, f64::from(reads) / began.elapsed().as_secs_f64()))
}
