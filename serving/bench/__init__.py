"""What measures, and is no part of the server: `bench` sends load to any server with OpenAI's interface and tells how well it was
answered, `simulate` replays such load on the server's own engine, on a clock that is only counted."""
