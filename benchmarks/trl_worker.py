# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "trl==0.11.4",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "diffusers==0.42.1",
#     "peft==0.21.2",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
# ///
